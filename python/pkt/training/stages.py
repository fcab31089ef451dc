"""Layers trained one after another: which one is the frontier at a step, and at what rate.

From shallow to deep, the steps split evenly. Only the frontier's adapters move; those of earlier
layers stay as trained, those of later ones are still what they began as. All follows from the
number of the step, so a run that is continued goes on where it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pkt.errors import UsageError

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Stages:
    """Stage i of n takes steps ⌊iN/n⌋ to ⌊(i + 1)N/n⌋ of N, and has a schedule of its own.

    A linear decay over the whole run would leave the deep layers hardly any rate.
    """

    layers: tuple[int, ...]  #: the frontier of each stage, from 1
    steps: int  #: N
    warmup: float  #: share of a stage's steps

    def _stage(self, step: int) -> tuple[int, int, int]:
        """Which it is, from 0, its first step, and the step behind its last."""
        ends = [(i + 1) * self.steps // len(self.layers) for i in range(len(self.layers))]
        stage = next((i for i, end in enumerate(ends) if step < end), len(ends) - 1)
        return stage, ends[stage - 1] if stage else 0, ends[stage]

    def frontier(self, step: int) -> int:
        """The layer that is trained when ``step`` steps are done."""
        return self.layers[self._stage(step)[0]]

    def rate(self, step: int) -> float:
        """The learning rate of that step over the peak: linear warm-up, linear decay."""
        _, first, end = self._stage(step)
        warm = min(math.ceil(self.warmup * (end - first)), end - first - 1)
        done = step - first
        if done < warm:
            return (done + 1) / (warm + 1)  # not from 0: a stage may be short
        return max(0.0, (end - first - done) / (end - first - warm))


def require_stages(layers: Sequence[int], steps: int, processes: int) -> None:
    """Refuse what cannot be trained layer by layer.

    Raises:
        UsageError: fewer steps than layers, or several processes: they agree once, before the
            first step, on the parameters whose gradients they exchange.

    """
    if layers and processes > 1:
        raise UsageError(
            f"training layer by layer: expected one process, found {processes}",
            "start it without accelerate launch, or take objective v1",
        )
    if layers and steps < len(layers):
        raise UsageError(
            f"training layer by layer: expected a step or more for each of {len(layers)} layers, "
            f"found {steps} steps",
            "raise --max-steps or --epochs",
        )


def train_only(model: Any, layer: int) -> None:
    """Let the LoRA factors of one layer, from 1, ask for gradients, and no others."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            found = _LAYER.search(name)
            parameter.requires_grad_(found is not None and int(found[1]) == layer - 1)
