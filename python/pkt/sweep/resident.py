"""A teacher that stays in memory, for whatever text is asked for next.

The same calls of the same layers as a `Sweep` makes, one text at a time: of a text that a sweep
takes through its layers alone, too, the states and the logits are bit-equal. One that shared a
batch there was computed in products of more rows, which round differently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from pkt.config import LOGIT_ELEMENTS
from pkt.products import bfloat16_products
from pkt.sublayers import SubLayer
from pkt.sweep.passes import Sweep


class ResidentSweep(Sweep):
    """A `Sweep` whose weights are read once and kept; nothing is left on the disk."""

    def hold(self) -> None:
        """Read every weight; `states` and `logits` want them.

        Raises:
            CheckpointError: the checkpoint lacks one.

        """
        depth = len(self.skeleton.layers)
        self._held = []
        self._multiplying = bfloat16_products(self.device, self.spool.dtype)
        for layer in range(depth):
            self._held.append(self.source.read(self.placement.layer(layer)))
            self.notify("load", layer + 1, depth)
        ends = self.placement.embedding, self.placement.head
        self._embedding = self.source.read({"rows": ends[0]})["rows"]
        tied = ends[0] == ends[1]
        self._weight = self._embedding if tied else self.source.read({"head": ends[1]})["head"]
        self._caught = [self.skeleton.sublayers(layer) for layer in range(depth)]
        self._tried = {"calls": False, "head": False}

    def release(self) -> None:
        """Give the memory of the weights back."""
        self._held, self._caught = [], []
        self._embedding = self._weight = torch.empty(0)

    def states(
        self,
        number: int,
        positions: torch.Tensor,
        sources: Collection[int],
        which: SubLayer | None = None,
        *,
        last: bool = False,
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """Activations (n, D) of one text, in the type computed in, on the device.

        Args:
            number: of the text.
            positions: (n,), of the text.
            sources: boundaries, 0 before the first layer; or layers, from 1, if ``which``.
            which: the sub-layer whose addition is wanted.
            last: whether the last boundary's are wanted too, for `logits`.

        Returns:
            by source, and of the last boundary.

        Raises:
            CheckpointError: a weight is NaN or infinite.
            IncompatibleError: the sweep would compute this family wrongly.
            PktError: an activation is NaN or infinite.

        """
        depth, found = len(self.skeleton.layers), {}
        with self._as_streamed():
            hidden = self._entered(number)
            if which is None and 0 in sources:
                found[0] = hidden[0][positions]
            for index in range(depth if last else max(sources)):
                if which is not None and index + 1 in sources:
                    with self._caught[index] as caught:
                        hidden = self._through(index, number, hidden)
                        found[index + 1] = caught.added(which)[0][positions]
                else:
                    hidden = self._through(index, number, hidden)
                    if which is None and index + 1 in sources:
                        found[index + 1] = hidden[0][positions]
            return found, hidden[0][positions] if last else None

    def logits(self, number: int, last: torch.Tensor) -> Iterator[torch.Tensor]:
        """Logits (m, V) float32 of rows of the last boundary, in blocks of a constant size.

        Raises:
            As `states`.

        """
        step = max(1, LOGIT_ELEMENTS // self._weight.shape[0])
        with self._as_streamed():
            if not self._tried["head"]:
                self.check_head(last, self._weight)
                self._tried["head"] = True
        for part in last.split(step):
            with self._as_streamed():
                logits = self.skeleton.logits(part, self._weight, self.outer).float()
                if not bool(logits.isfinite().all()):
                    pieces = {"head": self.placement.head, **self.placement.outer()}
                    weights = {"head": self._weight, **self.outer}
                    raise self.not_finite(pieces, weights, self.seeds[number], "logits")
            yield logits

    @contextmanager
    def _as_streamed(self) -> Iterator[None]:
        """Without gradients, and in the teacher's own type whatever the student is trained in."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), self._multiplying:
            yield

    def _entered(self, number: int) -> torch.Tensor:
        """The input of the first layer, (1, T, D)."""
        tokens = torch.tensor(self.seeds[number].tokens, device=self.device)
        rows = self._embedding[tokens]
        if not bool(rows.isfinite().all()) and (
            damage := self.placement.damage(self._embedding, self.placement.embedding)
        ):
            raise damage
        entered = self.skeleton.prefix(rows, self.outer)
        if not self._tried["calls"]:
            self.calls.require_same(self.skeleton.tape.calls, len(tokens))
            self._tried["calls"] = True
        return entered

    def _through(self, index: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """One layer."""
        weights = self._held[index]
        args, kwargs = self.calls.of(hidden.shape[1], index)
        result = self._apply(index, weights, hidden, args, kwargs)
        if not bool(result.isfinite().all()):
            raise self._bad_layer(index, weights, self.seeds[number], "activation")
        return result
