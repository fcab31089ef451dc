"""Which tensor goes where in a model written anew; nothing is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from pkt.checkpoint import DTYPE_BYTES, FLOAT_DTYPES, Checkpoint, Piece
from pkt.errors import IncompatibleError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Change:
    """``b @ a``, added to a stored matrix (rows, columns): b (rows, r), a (r, columns), float32."""

    b: torch.Tensor
    a: torch.Tensor


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor of the new model."""

    name: str
    source: Piece
    dtype: str  #: safetensors' spelling
    change: Change | None = None

    @property
    def bytes(self) -> int:
        """Bytes in its file."""
        if self.dtype == self.source.dtype:
            return self.source.bytes
        return self.source.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of the new model, by name, in order."""

    shards: Mapping[str, Sequence[Output]]
    indexed: bool  #: whether an index names them

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.bytes for shard in self.shards.values() for output in shard)


def lay_out(
    checkpoint: Checkpoint,
    changes: Mapping[str, Change],
    dtype: str | None = None,
    added: Mapping[str, str] | None = None,
    unread: Collection[str] = (),
) -> Layout:
    """Say which tensor goes where; nothing is read.

    Args:
        checkpoint: the source.
        changes: by the new model's tensor names.
        dtype: element type of every floating-point tensor; ``None`` keeps each one's own.
        added: tensors the source lacks: name → the source tensor it begins as. They are appended
            to the last file (a head that was tied, to be parted from the embedding).
        unread: tensors that no model is loaded from, copied as they are whatever ``dtype`` says (a
            mask of −10⁹ is infinite in float16).

    Raises:
        IncompatibleError: a changed tensor is no float matrix, or is kept in 8 bits.

    """
    pieces: dict[str, Piece] = {}
    for group in (*checkpoint.layers, checkpoint.outer):
        for piece in group.values():
            pieces[piece.name] = piece
    names = [str(path.relative_to(checkpoint.folder)) for path, _ in checkpoint.files]
    indexed = names != [SINGLE] and (checkpoint.folder / INDEX).is_file()
    names = names if indexed else [SINGLE]
    shards: dict[str, list[Output]] = {name: [] for name in names}
    for piece in sorted(pieces.values(), key=lambda p: (p.shard, p.begin, p.end, p.name)):
        to = None if piece.name in unread else dtype
        shards[names[piece.shard]].append(_output(piece.name, piece, changes, to, checkpoint))
    for name, source in (added or {}).items():
        shards[names[-1]].append(_output(name, pieces[source], changes, dtype, checkpoint))
    placed = {output.name for shard in shards.values() for output in shard}
    assert changes.keys() <= placed, changes.keys() - placed
    return Layout({name: shard for name, shard in shards.items() if shard}, indexed)


def _output(
    name: str,
    piece: Piece,
    changes: Mapping[str, Change],
    dtype: str | None,
    checkpoint: Checkpoint,
) -> Output:
    change = changes.get(name)
    kept = dtype is None or piece.dtype not in FLOAT_DTYPES
    stored = piece.dtype if kept or dtype is None else dtype
    if change is None:
        return Output(name, piece, stored)
    where = f"{checkpoint.folder}: tensor '{name}'"
    shape = (change.b.shape[0], change.a.shape[1])
    if piece.dtype not in FLOAT_DTYPES:
        raise IncompatibleError(f"{where}: expected floating-point weights, found {piece.dtype}")
    if stored.startswith("F8"):
        raise IncompatibleError(
            f"{where}: it is stored in {stored}, whose 8 bits would swallow the change",
            "add --dtype bfloat16 or --dtype float32",
        )
    if piece.shape != shape:
        raise IncompatibleError(f"{where}: expected shape {shape}, found {piece.shape}")
    return Output(name, piece, stored, change)
