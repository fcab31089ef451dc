"""At step 0 the model is the student: measured on its logits before any step is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pkt.errors import PktError
from pkt.records import Sample

SAMPLES, TOKENS = 2, 64  # what is compared: enough to meet every module, cheap for a 7B student
FLOAT32_BOUND = 1e-3
BFLOAT16_ROUNDING = 2.0**-8  # u: a value is stored within u/2 of itself


@dataclass(frozen=True, slots=True)
class StepZero:
    """How far the logits of two models lie apart, and how far they may."""

    difference: float  #: max |Δlogit|
    bound: float

    def require(self, what: str) -> None:
        """Raise unless the difference is within the bound.

        Raises:
            PktError: names both numbers.

        """
        if not self.difference <= self.bound:
            raise PktError(
                f"{what}: logits differ by {self.difference:.3g}; expected at most "
                f"{self.bound:.3g}",
                "please report it, with the versions that `pkt env` prints",
            )


@torch.no_grad()
def first_logits(model: Any, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """Logits (tokens, V) in float32 of the beginnings of the first samples, dropout off."""
    training = model.training
    model.eval()
    found = [
        model(
            input_ids=torch.tensor([sample.tokens[:TOKENS]], device=model.device), use_cache=False
        )
        .logits[0]
        .float()
        .cpu()
        for sample in samples[:SAMPLES]
    ]
    model.train(training)
    return found


def compare_logits(
    one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], dtype: torch.dtype, layers: int
) -> StepZero:
    """The largest difference, beside what rounding may do to it.

    float32: 1e-3. bfloat16: the residual stream is rounded twice a layer and once at the head,
    each time by at most u/2 of its size; where two runs round apart, the errors are independent,
    so they grow as the root of their number: 4·(u/2)·√(2L + 1)·max|logit|, 4 standard deviations.
    """
    difference = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    if dtype == torch.float32:
        return StepZero(difference, FLOAT32_BOUND)
    largest = max(float(a.abs().max()) for a in one)
    return StepZero(difference, 2 * BFLOAT16_ROUNDING * (2 * layers + 1) ** 0.5 * largest)
