"""A sweep that only goes forward, and leaves of every layer some positions' hidden states.

What a report needs of a model far larger than memory: its files are read once, and on the disk lie
the boundaries of one layer, and the states that were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pkt.sweep.names import boundary
from pkt.sweep.passes import Sweep
from pkt.sweep.spool import Spool


class StatesSweep(Sweep):
    """A `Sweep` for hidden states instead of gradients."""

    def leave(self, positions: Sequence[torch.Tensor], states: Spool) -> None:
        """Write the hidden states of some positions before layer 0 and after each layer.

        Args:
            positions: of each seed, ascending; their number may be 0.
            states: with as many blocks as seeds, each as long as its positions; `boundary` names
                the file before layer i, or after the last.

        Raises:
            CheckpointError: a weight is NaN or infinite.
            PktError: a seed's activation is.
            OutputError: the work folder cannot be written, or what it held is damaged.

        """
        depth = len(self.skeleton.layers)
        chunks = self.placement.embedding_chunks()
        jobs = [("embedding", {"rows": piece}) for piece in chunks]
        jobs += [(f"layer {layer}", self.placement.layer(layer)) for layer in range(depth)]
        weights = self.source.jobs(jobs)
        with self._timed("embed"):
            self._embed(weights, chunks)
        self._keep(0, positions, states)
        for layer in range(depth):
            with self._timed("forward"):
                self._forward(layer, next(weights))
                self._keep(layer + 1, positions, states)
            self.spool.drop(boundary(layer))
            self.notify("forward", layer + 1, depth)
        self.spool.drop(boundary(depth))

    def _keep(self, index: int, positions: Sequence[torch.Tensor], states: Spool) -> None:
        with states.writer(boundary(index), synced=False) as out:
            for number, wanted in enumerate(positions):
                out.append(self.spool.read(boundary(index), number)[wanted])
