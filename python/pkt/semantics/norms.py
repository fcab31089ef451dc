"""What the norm before the head does to a hidden state, found by asking it.

An RMSNorm is ``γ ⊙ h / rms(h)``, a LayerNorm the same of ``h − mean(h)``, plus an offset. Up to the
positive scale and the offset each is linear, so it folds into the head: ``W diag(γ)``, its rows
centred after a LayerNorm. Whether γ is stored as it is or less one, under what name, and whether
there is one at all differs between families: three probes tell without knowing any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from pkt.errors import IncompatibleError

SCALE = 1024.0  # of the probes: their variance drowns the norm's ε, and powers of two stay exact
TOLERANCE = 1e-3  # of what is predicted for a random state, relative to its largest channel

Normed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FinalNorm:
    """The linear part of a norm: ``h ↦ gain ⊙ (h − mean(h) if centred)``."""

    kind: Literal["RMSNorm", "LayerNorm", "none"]
    gain: torch.Tensor  #: (D,) float64

    @property
    def centred(self) -> bool:
        """Whether it takes the mean away first."""
        return self.kind == "LayerNorm"

    def fold_(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (n, D) float64 of a head, changed in place: what they are after this norm."""
        rows.mul_(self.gain.to(rows.device))
        return rows.sub_(rows.mean(1, keepdim=True)) if self.centred else rows


def no_norm(width: int) -> FinalNorm:
    """For rows that no norm stands before."""
    return FinalNorm("none", torch.ones(width, dtype=torch.float64))


def final_norm(normed: Normed, width: int, family: str) -> FinalNorm:
    """The norm that ``normed`` is, as far as it is linear.

    Args:
        normed: (n, D) float32 last hidden states ↦ what the head is given.
        width: D, at least 4.
        family: for the message.

    Raises:
        IncompatibleError: it is neither an RMSNorm nor a LayerNorm.

    """
    signs = torch.ones(width)
    signs[1::2] = -1
    if width % 2:
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0])  # mean 0, no channel 0
    draw = torch.Generator().manual_seed(0)
    other = torch.randn(width, generator=draw) * SCALE
    probes = torch.stack([signs, -signs, signs + 3]) * SCALE
    seen = normed(torch.cat([probes, other[None]])).double()
    if width < 4 or seen.shape != (4, width) or not bool(seen.isfinite().all()):
        raise _unknown(family)
    gain = (seen[0] - seen[1]) / 2 * signs.double().square().mean().sqrt() / signs.double()
    offset = (seen[0] + seen[1]) / 2
    near = TOLERANCE * float(seen.abs().max())
    centred = float((seen[2] - seen[0]).abs().max()) <= near
    state = other.double()
    state = state - state.mean() if centred else state
    predicted = gain * state / state.square().mean().sqrt() + offset
    if float((predicted - seen[3]).abs().max()) > near or not (
        centred or float(offset.abs().max()) <= near
    ):
        raise _unknown(family)
    return FinalNorm("LayerNorm" if centred else "RMSNorm", gain)


def _unknown(family: str) -> IncompatibleError:
    return IncompatibleError(
        f"model family '{family}': the norm before its head is neither an RMSNorm nor a LayerNorm",
        "--no-fold-norm leaves it out of the bases",
    )
