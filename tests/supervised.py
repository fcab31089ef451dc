"""A teacher's activations in memory, with the methods of `pkt.targets.Targets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pkt.records import LayerPair, TopLogits
from pkt.targets import top_logits


@dataclass
class Remembered:
    """States by student layer and example, and the whole logits of each example."""

    pairs: tuple[LayerPair, ...]
    answers: Sequence[int]
    held: Mapping[int, Sequence[torch.Tensor]]
    logits: Sequence[torch.Tensor]
    interface: str = "hidden"
    map: str = "dual"
    top_k: int = 7
    kept: Sequence[torch.Tensor] | None = None  #: aligned answer tokens; None: all

    def of(self, example: int) -> TopLogits:
        return top_logits(self.logits[example], self.top_k, self.logits[example].shape[1])

    def states(self, example: int, student_layer: int) -> torch.Tensor:
        return self.held[student_layer][example]

    def aligned(self, example: int) -> torch.Tensor:
        if self.kept is None:
            return torch.arange(self.answers[example])
        return self.kept[example]
