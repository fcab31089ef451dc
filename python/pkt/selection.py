"""Which part of a teacher matrix is taken, and which of its layers.

Strategies of methods.md §1.7 over scores S (float32, non-negative). All sums are fixed-point
integers in the Rust core: exact, so ties and threads cannot change an answer. Ties go to the
smallest row, then the smallest column; chosen rows and columns keep their order.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pkt import _core
from pkt.records import Heat, LayerRule, Select, Window

HEAT_BINS = 64


@dataclass(frozen=True, slots=True)
class Cut:
    """What to cut from one logical teacher matrix, and from where.

    ``rows`` holds the stored row of each logical row (``None``: the same), ``share`` how many
    logical rows share one stored row's scores.
    """

    key: str  #: the student's projection
    module: str  #: the teacher's module, whose stored scores these are
    teacher: str  #: the teacher's projection: the module, or a part of it
    shape: tuple[int, int]  #: of the student's matrix
    rows: Sequence[int] | None
    share: int


class Ranking:
    """The small record that each teacher layer leaves: which ones are kept shows only later.

    Args:
        cuts: what the student wants of a layer.
        select: strategy.
        seed: of the random strategies.
        layer_path: "model.layers", for names.
        keep_mask: stores a bit mask under a name.

    """

    def __init__(
        self,
        cuts: Sequence[Cut],
        select: Select,
        seed: int,
        layer_path: str,
        keep_mask: Callable[[str, bytes], None],
    ) -> None:
        self._cuts, self._select, self._seed = cuts, select, seed
        self._layer_path, self._keep_mask = layer_path, keep_mask
        self._found: dict[str, dict[str, Any]] = {}

    def matrix(self, layer: int, module: str, scores: NDArray[np.float32]) -> None:
        """Take note of one finished score matrix."""
        for cut in self._cuts:
            if cut.module == module:
                matrix = logical_matrix(scores, cut)
                bins = heat(matrix)
                shape = matrix.shape
                found = {"heat": {"shape": shape, "grid": bins.shape, "bins": _packed(bins, "<f4")}}
                if self._select == "consistent":  # chosen once the kept layers are known
                    rows, cols = (np.asarray(each) for each in matrix.sums())
                    found["sums"] = {"rows": _packed(rows, "<f8"), "cols": _packed(cols, "<f8")}
                else:
                    name = f"{self._layer_path}.{layer}.{cut.teacher}"
                    window, mask = choose(matrix, cut, name, self._select, self._seed)
                    if mask is not None:
                        self._keep_mask(mask_name(layer, cut.key), mask)
                    found["window"] = asdict(window)
                    if window.crossed:  # packed: lists of every layer stay until the end
                        rows, cols = (np.asarray(each) for each in (window.rows, window.cols))
                        found["window"] |= {
                            "rows": _packed(rows, "<u4"),
                            "cols": _packed(cols, "<u4"),
                        }
                self._found[cut.key] = found

    def layer(self, layer: int, score: float) -> dict[str, Any]:
        """The record of a layer whose matrices are all finished, JSON-able."""
        found, self._found = self._found, {}
        return {"layer": layer, "score": score, "cuts": found}


def mask_name(layer: int, key: str) -> str:
    """The name under which a layer's bit mask is kept."""
    return f"mask-{layer:05d}-{key}"


def recorded_window(record: Mapping[str, Any], key: str) -> Window:
    """The window that a layer's record holds for a student projection."""
    held = dict(record["cuts"][key]["window"])
    for field in ("rows", "cols"):
        indices = held[field]
        if isinstance(indices, str):
            indices = np.frombuffer(base64.b64decode(indices), "<u4").tolist()
        held[field] = None if indices is None else tuple(indices)
    return Window(**held)


def recorded_sums(
    record: Mapping[str, Any], key: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Σ S of each row and of each column of a logical teacher matrix, under ``consistent``."""
    held = record["cuts"][key]["sums"]
    rows, cols = (np.frombuffer(base64.b64decode(held[axis]), "<f8") for axis in ("rows", "cols"))
    return rows, cols


def recorded_heat(record: Mapping[str, Any], key: str) -> Heat:
    """The heat map that a layer's record holds for a student projection."""
    held = record["cuts"][key]["heat"]
    bins = np.frombuffer(base64.b64decode(held["bins"]), dtype="<f4").reshape(held["grid"])
    return Heat(bins, *held["shape"])


def logical_matrix(scores: NDArray[np.float32], cut: Cut) -> _core.Matrix:
    """The teacher matrix that ``cut`` sees over stored scores (rows, columns), which must stay."""
    rows = None if cut.rows is None else np.asarray(cut.rows, dtype=np.uint32)
    return _core.Matrix(scores.reshape(-1), scores.shape[1], rows, cut.share)


def choose(
    matrix: _core.Matrix, cut: Cut, name: str, select: Select, seed: int
) -> tuple[Window, bytes | None]:
    """The part of one matrix that a strategy takes.

    Args:
        matrix: the scores that ``cut`` sees.
        cut: the size wanted.
        name: full name of the teacher's projection; mixed into the seed, so that matrices differ.
        select: strategy, but for ``consistent``, which no single matrix can decide; ``orthogonal``
            takes the window (its factors differ later).
        seed: of the random strategies.

    Returns:
        the window, and for single weights the bit mask over the logical matrix, row-major,
        least significant bit first.

    """
    height, width = cut.shape
    if select in ("window", "orthogonal"):
        row, column, score = matrix.best_window(height, width)
    elif select == "random-window":
        row, column = _core.random_window(matrix.shape, cut.shape, mix_seed(seed, name))
        score = matrix.window_score((row, row + height), (column, column + width))
    elif select == "rows-cols":
        chosen = matrix.top_rows(height), matrix.top_columns(width)
        score = matrix.cross_score(*chosen)
        rows, cols = (tuple(indices) for indices in chosen)
        return Window(name, score, rows, cols, None, cut.share, crossed=True), None
    else:
        count = height * width
        if select == "top-weights":
            mask = matrix.top_weights(count)
        else:
            entries = matrix.shape[0] * matrix.shape[1]
            mask = _core.random_weights(entries, count, mix_seed(seed, name))
        digest = mask_sha256(mask)
        return Window(name, matrix.mask_score(mask), None, None, digest, cut.share), mask
    span = (row, row + height), (column, column + width)
    return Window(name, score, *span, None, cut.share), None


def choose_columns(sums: NDArray[np.float64], width: int, rows: int, teacher: str) -> Window:
    """The best run of ``width`` hidden channels of an embedding with column scores ``sums``."""
    start, score = _core.best_columns(sums, width)
    return Window(teacher, score, (0, rows), (start, start + width))


def pick_layers(scores: Sequence[float], count: int, rule: LayerRule, seed: int) -> list[int]:
    """The ``count`` teacher layers that feed the student's, in their original order."""
    depth = len(scores)
    if rule == "first":
        return list(range(count))
    if rule == "last":
        return list(range(depth - count, depth))
    if rule == "random":
        return sorted(random.Random(f"layers {seed}").sample(range(depth), count))
    return list(_core.top_layers(list(scores), count))


def heat(matrix: _core.Matrix) -> NDArray[np.float32]:
    """Mean score in a grid of at most 64 × 64 bins."""
    rows, columns = (min(HEAT_BINS, size) for size in matrix.shape)
    means: NDArray[Any] = np.asarray(matrix.bin_means(rows, columns), dtype=np.float32)
    return means.reshape(rows, columns)


def mask_indices(mask: bytes, start: int, stop: int) -> NDArray[np.int64]:
    """Flat indices chosen between ``start`` (a multiple of 8) and ``stop``, less ``start``."""
    part = np.frombuffer(mask, dtype=np.uint8)[start // 8 : -(-stop // 8)]
    bits = np.unpackbits(part, bitorder="little")[: stop - start]
    return np.flatnonzero(bits)


def mask_sha256(mask: bytes) -> str:
    """SHA-256 of the chosen flat indices, ascending, as little-endian u64."""
    digest = hashlib.sha256()
    for start in range(0, 8 * len(mask), 1 << 23):
        found = mask_indices(mask, start, min(start + (1 << 23), 8 * len(mask)))
        digest.update((found + start).astype("<u8").tobytes())
    return digest.hexdigest()


def _packed(numbers: NDArray[Any], kind: str) -> str:
    """Little-endian numbers as base64, for a JSON record."""
    return base64.b64encode(numbers.astype(kind).tobytes()).decode()


def mix_seed(seed: int, name: str) -> int:
    """A seed of 64 bits for the matrix ``name``."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
