"""The Rust core: reading, scoring, selecting, merging, writing. Memory stays with the caller."""

from os import PathLike
from typing import Any, final

from numpy import float32, float64, uint8, uint16, uint32
from numpy.typing import NDArray

__all__ = [
    "Catalogue",
    "Layout",
    "Matrix",
    "Packed",
    "Reader",
    "Stream",
    "Writer",
    "accumulate",
    "accumulate_columns",
    "accumulate_products",
    "best_columns",
    "dtype_bytes",
    "layout",
    "merge",
    "random_weights",
    "random_window",
    "score_sum",
    "top_layers",
]

@final
class Catalogue:
    """The validated tensors of a model folder."""

    def __new__(cls, folder: str | PathLike[str]) -> Catalogue: ...
    def files(self) -> list[tuple[str, int]]:
        """(path, bytes) of each shard."""

    def entries(self) -> list[tuple[str, int, str, list[int], int, int]]:
        """(name, shard, dtype, shape, begin, end) of each tensor, by name."""

    @property
    def unindexed(self) -> list[str]:
        """Tensors in the shards that the index does not list."""

    @property
    def sha256(self) -> str:
        """Hash of shard names and headers."""

def dtype_bytes(name: str) -> int:
    """Bytes of an element of a safetensors dtype."""

@final
class Layout:
    """Where tensors lie in a slot, and the reads that bring them there."""

    @property
    def places(self) -> list[int]:
        """Offset in the slot of each extent."""

    @property
    def bytes(self) -> int:
        """Bytes the slot must have."""

def layout(extents: list[tuple[int, int, int, int]]) -> Layout:
    """Place extents (file, begin, end, element bytes) in a slot."""

@final
class Reader:
    """Open shards and the threads that read them."""

    def __new__(cls, files: list[tuple[str, int]], mode: str, threads: int) -> Reader: ...
    @property
    def mode(self) -> str:
        """The mode in use: mmap, buffered or direct."""

    @property
    def notices(self) -> list[str]:
        """What the user should know, such as a refused direct mode."""

    @property
    def bytes(self) -> int:
        """Bytes read by `read` and `read_rows`; streams count their own."""

    def read(self, layout: Layout, target: NDArray[uint8]) -> None:
        """Fill target as layout says."""

    def read_rows(
        self,
        extent: tuple[int, int, int, int],
        shape: tuple[int, int],
        rows: tuple[int, int],
        columns: tuple[int, int],
        target: NDArray[uint8],
    ) -> None:
        """Read rows and columns of a row-major matrix densely into target."""

@final
class Stream:
    """Jobs read ahead into slots."""

    def __new__(cls, reader: Reader, slots: list[NDArray[uint8]], jobs: list[Layout]) -> Stream: ...
    def next(self) -> tuple[int, int] | None:
        """(job, slot) of the next job, waiting until it is read; None after the last."""

    def release(self, slot: int) -> None:
        """Give a slot back to the reader."""

    def close(self) -> None:
        """Stop reading; the slots are free when this returns."""

    def counts(self) -> dict[str, Any]:
        """Bytes, seconds and stalls so far."""

def accumulate(
    weights: NDArray[Any],
    weights_dtype: str,
    gradients: NDArray[Any],
    gradients_dtype: str,
    scores: NDArray[float32],
) -> int | None:
    """Add |weights · gradients| of one sample to scores; the first index that is not finite."""

def accumulate_columns(
    weights: NDArray[Any],
    weights_dtype: str,
    gradients: NDArray[Any],
    gradients_dtype: str,
    columns: int,
    sums: NDArray[float64],
) -> int | None:
    """Add the column sums of |weights · gradients| of one sample to sums."""

def accumulate_products(
    weights: NDArray[Any],
    weights_dtype: str,
    columns: int,
    inputs: list[NDArray[uint16]],
    upstream: list[NDArray[uint16]],
    scores: NDArray[float32],
    fresh: bool,
) -> int | None:
    """Add |weights · dYᵀX| of some bfloat16 samples to scores, in their order; to zeros if fresh.

    The first sample after which a score is not finite.
    """

def score_sum(scores: NDArray[float32]) -> float:
    """Sum of scores in f64, in a fixed order."""

@final
class Packed:
    """A matrix (n, m), laid out to be multiplied from the left by a few rows."""

    def __new__(cls, matrix: NDArray[Any], dtype: str, rows: int, columns: int) -> Packed: ...
    def multiply(self, rows: NDArray[float32], products: NDArray[float32], turned: bool) -> None:
        """Set products (b, m) to rows (b, n) times the matrix; turned, by its transpose."""

@final
class Matrix:
    """A logical matrix over stored scores: a row map, and how many rows share a score.

    The first call reads the scores to check them; they must stay as they are.
    """

    def __new__(
        cls,
        scores: NDArray[float32],
        columns: int,
        rows: NDArray[uint32] | None = None,
        share: int = 1,
    ) -> Matrix: ...
    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the logical matrix."""

    def best_window(self, rows: int, columns: int) -> tuple[int, int, float]:
        """(row, column, score) of the best contiguous window."""

    def window_score(self, rows: tuple[int, int], columns: tuple[int, int]) -> float:
        """Sum of a window, given as half-open ranges."""

    def top_rows(self, k: int) -> list[int]:
        """The k rows of the largest sums, ascending."""

    def top_columns(self, k: int) -> list[int]:
        """The k columns of the largest sums, ascending."""

    def sums(self) -> tuple[list[float], list[float]]:
        """(sum of each row, sum of each column)."""

    def cross_score(self, rows: list[int], columns: list[int]) -> float:
        """Sum where chosen rows and columns cross."""

    def top_weights(self, k: int) -> bytes:
        """Bit mask of the k largest entries."""

    def mask_score(self, mask: bytes) -> float:
        """Sum of the entries of a bit mask."""

    def bin_means(self, rows: int, columns: int) -> list[float]:
        """Mean score of each bin of a grid, row-major."""

def best_columns(sums: NDArray[float64], width: int) -> tuple[int, float]:
    """(start, score) of the best run of columns."""

def top_layers(scores: list[float], k: int) -> list[int]:
    """The k highest layers, ascending."""

def random_weights(len: int, k: int, seed: int) -> bytes:
    """Bit mask of k of len entries, every subset equally likely."""

def random_window(shape: tuple[int, int], window: tuple[int, int], seed: int) -> tuple[int, int]:
    """(row, column) of a window, every place equally likely."""

def merge(
    weights: NDArray[Any],
    weights_dtype: str,
    delta: NDArray[float32] | None,
    target: NDArray[Any],
    target_dtype: str,
) -> tuple[float, float, int | None]:
    """Write round(weights + delta) to target; (Σ rounding error², Σ change², first not finite)."""

@final
class Writer:
    """A safetensors file that is written piece by piece and appears whole."""

    def __new__(
        cls, path: str | PathLike[str], tensors: list[tuple[str, str, list[int]]]
    ) -> Writer: ...
    def write(self, name: str, data: NDArray[uint8]) -> None:
        """Write the next bytes of a tensor."""

    def finish(self) -> int:
        """Sync the file and give it its name; its length."""

    def close(self) -> None:
        """Give the file up, if it is not finished."""
