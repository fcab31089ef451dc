"""A model folder's safetensors files, as pieces that can be asked for.

The Rust core validates every header and the index (`pkt._core.Catalogue`); this module sorts
the tensors into decoder layers and the rest, and finds the tensor of a parameter whose name the
checkpoint spells differently. Nothing here reads a weight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pkt import _core
from pkt.errors import CheckpointError, IncompatibleError

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")

# The first number that is followed by a dot and something else. Names come from files: each run of
# digits is looked at once, and one that no layer can have is none.
_LAYER = re.compile(r"(?<![0-9])(?P<index>[0-9]{1,9})\.(?=.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or some rows of one: where its bytes lie and what they mean."""

    name: str  #: as the checkpoint spells it
    shard: int
    dtype: str  #: safetensors' spelling
    shape: tuple[int, ...]
    begin: int  #: absolute offset in the shard
    end: int

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def rows(self, start: int, stop: int) -> Piece:
        """Rows ``start`` to ``stop`` of a tensor of at least one dimension."""
        row_bytes = self.bytes // self.shape[0]
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            begin=self.begin + start * row_bytes,
            end=self.begin + stop * row_bytes,
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The validated tensors of a model folder, sorted by decoder layer.

    ``layers[i]`` maps a tensor's suffix ("self_attn.q_proj.weight") to its piece; ``outer``
    maps the full names of all other tensors.
    """

    folder: Path
    files: tuple[tuple[Path, int], ...]  #: (path, bytes) of each shard
    layer_path: str  #: "model.layers", as the checkpoint spells it
    layers: tuple[Mapping[str, Piece], ...]
    outer: Mapping[str, Piece]
    unindexed: tuple[str, ...]  #: tensors that the index does not list, left alone
    bytes: int  #: of all tensors
    sha256: str  #: over shard names and headers
    modified: tuple[int, ...] = ()  #: when each shard was last written to, in ns since the epoch

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest layer."""
        return max(sum(p.bytes for p in layer.values()) for layer in self.layers)

    def state(self) -> dict[str, int]:
        """When each shard was last written to, by its name inside the folder.

        Headers alone do not tell two sets of weights apart: work that was begun on one must not be
        continued on another.
        """
        names = [str(path.relative_to(self.folder)) for path, _ in self.files]
        return dict(zip(names, self.modified, strict=True))

    def require_unchanged(self) -> None:
        """Raise `CheckpointError` if a shard has been written to since its header was read."""
        for (path, _), modified in zip(self.files, self.modified, strict=True):
            if path.stat().st_mtime_ns != modified:
                raise CheckpointError(
                    f"{path}: expected the file whose header was read, "
                    "found that it was written to since",
                    "leave the checkpoint alone while it is in use, and start again",
                )

    def shard_name(self, piece: Piece) -> str:
        """The file that holds ``piece``."""
        return self.files[piece.shard][0].name

    def dtypes(self) -> list[str]:
        """Element types of the floating-point layer tensors, the most frequent first."""
        counts: Counter[str] = Counter()
        for layer in self.layers:
            for piece in layer.values():
                if piece.dtype in FLOAT_DTYPES:
                    counts[piece.dtype] += piece.elements
        return [dtype for dtype, _ in counts.most_common()]


def open_checkpoint(folder: Path, layer_count: int) -> Checkpoint:
    """Validate the headers of ``folder`` and sort its tensors.

    Args:
        folder: holds model.safetensors, or an index and its shards.
        layer_count: decoder layers that the model's configuration promises.

    Raises:
        CheckpointError: damaged, pickled or missing files (from the Rust core).
        IncompatibleError: no numbered run of ``layer_count`` decoder layers.

    """
    catalogue = _core.Catalogue(str(folder))
    pieces = [
        Piece(name, shard, dtype, tuple(shape), begin, end)
        for name, shard, dtype, shape, begin, end in catalogue.entries()
    ]
    numbered: dict[str, dict[int, dict[str, Piece]]] = {}
    for piece in pieces:
        if match := _LAYER.search(piece.name):
            path = piece.name[: match.start()].removesuffix(".")
            by_index = numbered.setdefault(path, {})
            by_index.setdefault(int(match["index"]), {})[piece.name[match.end() :]] = piece
    fitting = [path for path, found in numbered.items() if len(found) == layer_count]
    # Something else may be numbered alike; the decoder layers are what weighs most.
    fitting.sort(
        key=lambda path: -sum(p.bytes for d in numbered[path].values() for p in d.values())
    )
    if not fitting:
        runs = [f"{path[:100]}.* × {len(rows)}" for path, rows in numbered.items()]
        more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
        found = ", ".join(runs[:5]) + more or "none"
        raise IncompatibleError(
            f"{folder}: expected one run of {layer_count} decoder layers, found {found}",
            "pkt reads decoder-only models whose layers are numbered in one list",
        )
    path = fitting[0]
    missing = sorted(set(range(layer_count)) - set(numbered[path]))
    if missing:
        raise CheckpointError(f"{folder}: layer {path}.{missing[0]} has no tensor")
    layers = tuple(numbered[path][index] for index in range(layer_count))
    inside = {piece.name for layer in layers for piece in layer.values()}
    files = tuple((Path(file), size) for file, size in catalogue.files())
    return Checkpoint(
        folder=folder,
        files=files,
        layer_path=path,
        layers=layers,
        outer={piece.name: piece for piece in pieces if piece.name not in inside},
        unindexed=tuple(catalogue.unindexed),
        bytes=sum(piece.bytes for piece in pieces),
        sha256=catalogue.sha256,
        modified=tuple(path.stat().st_mtime_ns for path, _ in files),
    )


def find_outer(checkpoint: Checkpoint, name: str, prefix: str) -> Piece | None:
    """The piece of the parameter ``name`` outside the decoder layers, or ``None``.

    Checkpoints saved from the bare base model lack its prefix, others carry one too many:
    ``name``, ``name`` without ``prefix.`` and ``prefix.name`` are tried in this order. Embedding
    and head are known by other names too (GPT-NeoX writes its lm_head as embed_out).
    """
    for spelling in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if spelling in checkpoint.outer:
            return checkpoint.outer[spelling]
    for synonyms in (EMBEDDINGS, HEADS):
        if first_of([name], synonyms) and (found := first_of(checkpoint.outer, synonyms)):
            return checkpoint.outer[found]
    return None


def first_of(names: Iterable[str], endings: tuple[str, ...]) -> str | None:
    """The first of ``names`` that ends in one of ``endings`` after a dot or alone."""
    for name in names:
        if any(name == ending or name.endswith(f".{ending}") for ending in endings):
            return name
    return None
