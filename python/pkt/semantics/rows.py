"""Rows of a head (or of an input embedding), read from the checkpoint in chunks, in float64."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from pkt.checkpoint import Piece
from pkt.errors import CheckpointError
from pkt.semantics.norms import FinalNorm

CHUNK_ELEMENTS = 1 << 22  # of the wider model, at once; a constant: no result depends on a budget

Read = Callable[[dict[str, Piece]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Rows:
    """A (V, D) matrix on the disk, and the norm that stands before it."""

    piece: Piece
    shard: str  #: its file, for messages
    read: Read  #: of the checkpoint, as stored
    norm: FinalNorm

    @property
    def width(self) -> int:
        """D."""
        return self.piece.shape[1]

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows ``ids`` in their order, (n, D) float64, the norm folded in.

        Raises:
            CheckpointError: one of them is NaN or infinite.

        """
        ordered, place = ids.sort()
        breaks = (ordered.diff() != 1).nonzero()[:, 0] + 1
        runs = zip([0, *breaks.tolist()], [*breaks.tolist(), len(ids)], strict=True)
        pieces = {}
        for begin, end in runs:
            start = int(ordered[begin])
            pieces[f"{start}"] = self.piece.rows(start, start + end - begin)
        stored = torch.cat(list(self.read(pieces).values())) if pieces else torch.empty(0)
        found = torch.empty(len(ids), self.width, dtype=torch.float64, device=stored.device)
        found[place.to(stored.device)] = stored.double()
        if not bool(found.isfinite().all()):
            row, channel = (int(i) for i in (~found.isfinite()).nonzero()[0])
            raise CheckpointError(
                f"tensor '{self.piece.name}' in {self.shard}: expected finite weights, "
                f"found {float(found[row, channel])} at ({int(ids[row])}, {channel})",
                "the checkpoint is damaged: fetch it again",
            )
        return self.norm.fold_(found)

    def sha256(self) -> str:
        """Hash of every stored row and of the norm."""
        digest = hashlib.sha256(self.norm.kind.encode())
        digest.update(self.norm.gain.numpy().data)
        step = max(1, CHUNK_ELEMENTS // self.width)
        for start in range(0, self.piece.shape[0], step):
            part = self.piece.rows(start, min(start + step, self.piece.shape[0]))
            stored = self.read({"rows": part})["rows"].cpu().contiguous()
            digest.update(stored.view(torch.uint8).numpy().data)
        return digest.hexdigest()


@dataclass(frozen=True)
class HeadPair:
    """The rows that two heads have for the same tokens."""

    teacher: Rows
    student: Rows
    ids: torch.Tensor  #: (n, 2) teacher row, student row

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Ids (c, 2), teacher rows (c, D_T) and student rows (c, D_S), float64, chunk by chunk.

        Tokens whose row is all zero in either model are left out: no text has trained them.
        """
        step = max(1, CHUNK_ELEMENTS // max(self.teacher.width, self.student.width))
        for ids in self.ids.split(step):
            theirs, ours = self.teacher.take(ids[:, 0]), self.student.take(ids[:, 1])
            live = theirs.any(1) & ours.any(1).to(theirs.device)
            if not bool(live.all()):
                ids, theirs, ours = ids[live.cpu()], theirs[live], ours[live]
            yield ids, theirs, ours

    def sha256(self) -> str:
        """Hash of which rows belong together."""
        return hashlib.sha256(self.ids.contiguous().numpy().data).hexdigest()
