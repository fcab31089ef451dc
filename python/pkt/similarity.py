"""How well mapped states say what the teacher says, and how alike the layers of two models are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pkt.config import LOGIT_ELEMENTS

LEAST_STATES = 4  # that the unbiased estimator is defined for


@dataclass(frozen=True)
class Lens:
    """By layer, mean over states: how a mapped state's logits agree with those of the state."""

    cosine: tuple[float, ...]  #: of logits less their mean over the vocabulary
    top1: tuple[float, ...]  #: share of states with the same top token


def lens_quality(
    heads: Iterable[tuple[torch.Tensor, torch.Tensor]],
    states: torch.Tensor,
    mapped: Mapping[str, torch.Tensor],
) -> dict[str, Lens]:
    """Logit lens of mapped states against that of the states they were mapped from.

    ``z_T = W_T h``, ``z_S = W_S M h`` over the shared rows, norms folded in; the centred cosine is
    ``cos(z_T − mean z_T, z_S − mean z_S)``. Products in float32, sums over rows in float64.

    Args:
        heads: chunks of (teacher rows (c, D_T), student rows (c, D_S)), from first to last.
        states: teacher states (L, P, D_T) float32 of L layers.
        mapped: by map, (L, P, D_S) float32.

    """
    layers, count = states.shape[:2]
    theirs = _Sums(states)
    ours = {name: _Sums(each, theirs) for name, each in mapped.items()}
    first = 0
    for teacher, student in heads:
        teacher, student = teacher.float(), student.float()
        step = max(1, LOGIT_ELEMENTS // len(teacher))
        for start in range(0, layers * count, step):
            here = slice(start, start + step)
            wanted = theirs.add(teacher, here, first)
            for sums in ours.values():
                sums.add(student, here, first, wanted)
        first += len(teacher)
    found = {}
    for name, sums in ours.items():
        cosine = sums.cosine(first).view(layers, count).mean(1)
        agree = (sums.best == theirs.best).double().view(layers, count).mean(1)
        found[name] = Lens(tuple(cosine.tolist()), tuple(agree.tolist()))
    return found


class _Sums:
    """Running sums over the vocabulary of the logits of (L · P) states, and their top token."""

    def __init__(self, states: torch.Tensor, other: _Sums | None = None) -> None:
        self._states, self._other = states.flatten(0, 1), other
        self.sum, self.square, self.cross = (
            torch.zeros(len(self._states), dtype=torch.float64, device=states.device)
            for _ in range(3)
        )
        self._most = torch.full_like(self.sum, -torch.inf, dtype=torch.float32)
        self.best = torch.zeros_like(self.sum, dtype=torch.long)

    def add(
        self, rows: torch.Tensor, here: slice, first: int, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The logits (c, p) of some states for ``rows`` (c, D); ``wanted``: the other model's."""
        logits = rows @ self._states[here].T
        self.sum[here] += logits.sum(0, dtype=torch.float64)
        self.square[here] += logits.square().sum(0, dtype=torch.float64)
        if wanted is not None:
            self.cross[here] += (logits * wanted).sum(0, dtype=torch.float64)
        most, best = logits.max(0)
        better = most > self._most[here]
        self._most[here] = torch.where(better, most, self._most[here])
        self.best[here] = torch.where(better, best + first, self.best[here])
        return logits

    def cosine(self, rows: int) -> torch.Tensor:
        """Of centred logits, by state; 0 where either has none."""
        other = self._other
        assert other is not None
        cross = self.cross - self.sum * other.sum / rows
        own = self.square - self.sum.square() / rows
        theirs = other.square - other.sum.square() / rows
        return cross / (own.clamp(min=0) * theirs.clamp(min=0)).sqrt().clamp(min=1e-300)


def linear_cka(theirs: Iterable[torch.Tensor], ours: Sequence[torch.Tensor]) -> list[list[float]]:
    """Linear CKA of each teacher layer with each student layer.

    ``⟨K̃, L̃⟩ / (‖K̃‖ ‖L̃‖)`` of kernels ``K = X Xᵀ`` centred for the unbiased estimator of HSIC: the
    plain one comes out near 1 for anything with fewer states than channels. It may be slightly
    negative.

    Args:
        theirs: teacher states (n, D_T) by layer.
        ours: student states (n, D_S) by layer, of the same n ≥ 4 places.

    Returns:
        rows: teacher layers; columns: student layers.

    Source: Kornblith et al., arXiv 1905.00414; Song et al., JMLR 13 (2012), eq. 5 (estimator).

    """
    kernels = torch.stack([kernel(states).flatten() for states in ours])
    return [(kernels @ kernel(states).flatten()).tolist() for states in theirs]


def kernel_cka(theirs: torch.Tensor, ours: torch.Tensor) -> list[list[float]]:
    """The same of layers by their kernels (`kernel`), (L_T, n, n) and (L_S, n, n)."""
    found: list[list[float]] = (theirs.double().flatten(1) @ ours.double().flatten(1).T).tolist()
    return found


def kernel(states: torch.Tensor) -> torch.Tensor:
    """U-centred ``X Xᵀ`` of norm 1, (n, n) float64, of n ≥ 4 states (n, D)."""
    count = len(states)
    assert count >= LEAST_STATES
    wide = states.double()
    found: torch.Tensor = wide @ wide.T
    found.fill_diagonal_(0)
    sums = found.sum(0)
    found -= (sums[:, None] + sums[None, :]) / (count - 2)
    found += sums.sum() / ((count - 1) * (count - 2))
    found.fill_diagonal_(0)
    norm = torch.linalg.vector_norm(found)
    return found / norm if norm > 0 else found
