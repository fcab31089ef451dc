"""Which tensor of the checkpoint is which parameter of the model.

Layer tensors go by their suffix; everything else by name, with or without the base model's
prefix. Buffers that the model saves (a learned scale, say) are loaded like parameters, though
not scored; stored tensors that today's model does not know (old rotary buffers) stay on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pkt.checkpoint import FLOAT_DTYPES, Checkpoint, Piece, find_outer
from pkt.errors import CheckpointError, IncompatibleError
from pkt.sweep.skeleton import Skeleton

_FOREIGN = "the checkpoint does not belong to this config.json"


@dataclass(frozen=True)
class Placement:
    """The pieces of one checkpoint by the parameters of its skeleton."""

    skeleton: Skeleton
    checkpoint: Checkpoint
    chunk_rows: int  #: embedding rows that are read at once

    def layer(self, index: int) -> dict[str, Piece]:
        """The pieces of a decoder layer, by parameter suffix; shapes are those of the model.

        Raises:
            CheckpointError: a parameter has no tensor, or one of another shape.
            IncompatibleError: it is stored as integers.

        """
        pieces, found = self.checkpoint.layers[index], {}
        for name, parameter in self.skeleton.layers[index].named_parameters():
            if name not in pieces:
                where = f"{self.checkpoint.folder}: layer {index}"
                raise CheckpointError(f"{where} has no tensor '{name}'", _FOREIGN)
            found[name] = self._checked(pieces[name], tuple(parameter.shape))
        for name, buffer in _saved_buffers(self.skeleton.layers[index]).items():
            if name in pieces:
                found[name] = self._checked(pieces[name], tuple(buffer.shape))
        return found

    def outer(self) -> dict[str, Piece]:
        """The pieces of what lies outside the layers, less embedding and head."""
        shapes = {name: tuple(p.shape) for name, p in self.skeleton.model.named_parameters()}
        found = {n: self._checked(self._place(n), shapes[n]) for n in self.skeleton.outer}
        for name, buffer in _saved_buffers(self.skeleton.model).items():
            if piece := find_outer(self.checkpoint, name, self.skeleton.base_prefix):
                found[name] = self._checked(piece, tuple(buffer.shape))
        return found

    @property
    def head(self) -> Piece:
        """The head's tensor: the embedding's where the checkpoint holds only that."""
        return self._end(self.skeleton.head, self.skeleton.embedding)

    @property
    def embedding(self) -> Piece:
        """The embedding's tensor: the head's where the checkpoint holds only that."""
        return self._end(self.skeleton.embedding, self.skeleton.head)

    def embedding_chunks(self) -> list[Piece]:
        """The embedding in runs of rows that fit a slot."""
        whole = self.embedding
        starts = range(0, whole.shape[0], self.chunk_rows)
        return [whole.rows(s, min(s + self.chunk_rows, whole.shape[0])) for s in starts]

    def damage(
        self, weight: torch.Tensor, piece: Piece, first_row: int = 0
    ) -> CheckpointError | None:
        """The error that names the first weight of ``piece`` that is NaN or infinite.

        ``weight`` may be a run of its rows, from ``first_row`` on.
        """
        bad = ~torch.isfinite(weight)
        if not bool(bad.any()):
            return None
        at = tuple(int(index) for index in bad.nonzero()[0])
        where = (at[0] + first_row, *at[1:]) if at else at
        return CheckpointError(
            f"tensor '{piece.name}' in {self.checkpoint.shard_name(piece)}: "
            f"expected finite weights, found {float(weight[at])} at {where}",
            "the checkpoint is damaged: fetch it again",
        )

    def _end(self, name: str, partner: str) -> Piece:
        found = find_outer(self.checkpoint, name, self.skeleton.base_prefix)
        piece = found or self._place(partner if self.skeleton.may_tie else name)
        shape = tuple(self.skeleton.model.get_parameter(self.skeleton.head).shape)
        return self._checked(piece, shape)

    def _place(self, name: str) -> Piece:
        piece = find_outer(self.checkpoint, name, self.skeleton.base_prefix)
        if piece is None:
            where = self.checkpoint.folder
            raise CheckpointError(f"{where}: no tensor for the parameter '{name}'", _FOREIGN)
        return piece

    def _checked(self, piece: Piece, shape: tuple[int, ...]) -> Piece:
        if piece.dtype not in FLOAT_DTYPES:
            raise IncompatibleError(
                f"tensor '{piece.name}' in {self.checkpoint.shard_name(piece)}: expected "
                f"floating-point weights, found {piece.dtype}",
                "pkt reads checkpoints that are not quantized",
            )
        if piece.shape != shape:
            raise CheckpointError(
                f"tensor '{piece.name}' in {self.checkpoint.shard_name(piece)}: "
                f"expected shape {shape} from config.json, found {piece.shape}",
                _FOREIGN,
            )
        return piece


def _saved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Persistent floating-point buffers, by name."""
    saved = module.state_dict()
    return {n: b for n, b in module.named_buffers() if n in saved and b.is_floating_point()}
