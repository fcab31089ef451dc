"""Gram matrices of two heads over their shared rows, and what is done where they are singular.

``G = WᵀW`` (D × D) is summed over vocabulary chunks in float64, so no V × D matrix ever exists in
it; basis vectors are ``s_i = W⁺ e_i = G⁻¹ w_i`` by Cholesky. A head that does not span its residual
stream (rows dropped, or dependent columns) gets a ridge, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pkt.errors import IncompatibleError
from pkt.semantics.rows import HeadPair

WORST_CONDITION = 1e10  # above, G += RIDGE · tr(G)/D · I
RIDGE = 1e-8
BLOCK = 1024  # columns of a Gram matrix made at once; those below the diagonal are copies
PROBES = 64  # states that the self-cosine is the mean of


@dataclass(frozen=True)
class Treated:
    """A Gram matrix that can be divided by, and what had to be done to it."""

    lower: torch.Tensor  #: Cholesky factor of what is divided by
    condition: float  #: λ_max / λ_min of G, before any ridge
    rank: int  #: eigenvalues above D ε λ_max
    ridge: float  #: added to the diagonal; 0 where the condition is good

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """``G⁻¹ right`` for (D, n) columns."""
        return torch.cholesky_solve(right, self.lower)


@dataclass(frozen=True)
class Grams:
    """What one pass over the shared rows leaves, float64."""

    teacher: torch.Tensor  #: G_T (D_T, D_T)
    student: torch.Tensor  #: G_S (D_S, D_S)
    cross: torch.Tensor  #: W_Sᵀ W_T (D_S, D_T)
    rows: int  #: that are not zero in either


@dataclass(frozen=True)
class Recomposed:
    """v1's map, and how like itself a state is after it within one model.

    A self-cosine is the mean of ``cos(h, Ŝ Ŝᵀ h)`` over states of no preferred direction, taken
    apart and put together in their own model, where 1 would lose nothing.
    """

    map: torch.Tensor  #: Ŝ_S Ŝ_Tᵀ (D_S, D_T)
    teacher_self: float
    student_self: float


class Bases:
    """The semantic bases of two heads over their shared rows; each part is made when asked for.

    Args:
        pair: the rows.
        seed: of the probes of the self-cosine.

    """

    def __init__(self, pair: HeadPair, seed: int = 0) -> None:
        self.pair, self._seed = pair, seed

    @cached_property
    def grams(self) -> Grams:
        """G_T, G_S and W_Sᵀ W_T, from one reading of both heads."""
        theirs, ours, cross, rows = None, None, None, 0
        for ids, teacher, student in self.pair.chunks():
            if theirs is None or ours is None or cross is None:
                theirs, ours = (_zeros(w, w.shape[1], w.shape[1]) for w in (teacher, student))
                cross = _zeros(teacher, student.shape[1], teacher.shape[1])
            _add_gram(theirs, teacher)
            _add_gram(ours, student)
            cross.addmm_(student.T, teacher)
            rows += len(ids)
        if theirs is None or ours is None or cross is None or not rows:
            raise IncompatibleError("the two heads share no row that is not zero")
        return Grams(_mirrored(theirs), _mirrored(ours), cross, rows)

    @cached_property
    def teacher(self) -> Treated:
        """G_T, made safe to divide by."""
        return treated(self.grams.teacher, centred=self.pair.teacher.norm.centred)

    @cached_property
    def student(self) -> Treated:
        """G_S, made safe to divide by."""
        return treated(self.grams.student, centred=self.pair.student.norm.centred)

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Unit basis vectors ``s_i / n_i`` as columns, (D_T, c) and (D_S, c), chunk by chunk."""
        for _, theirs, ours in self.pair.chunks():
            yield _units(self.teacher.solve(theirs.T)), _units(self.student.solve(ours.T))

    @cached_property
    def recomposed(self) -> Recomposed:
        """``Ŝ_S Ŝ_Tᵀ`` of unit basis vectors, and the self-cosines, from one more reading."""
        made = torch.zeros_like(self.grams.cross)
        draw = torch.Generator().manual_seed(self._seed)
        states = [
            torch.randn(len(gram), PROBES, generator=draw, dtype=torch.float64).to(gram.device)
            for gram in (self.grams.teacher, self.grams.student)
        ]
        again = [torch.zeros_like(state) for state in states]
        for units in self.chunks():
            made.addmm_(units[1], units[0].T)
            for state, back, unit in zip(states, again, units, strict=True):
                back.addmm_(unit, unit.T @ state)
        theirs, ours = (
            float(torch.cosine_similarity(state, back, dim=0).mean())
            for state, back in zip(states, again, strict=True)
        )
        return Recomposed(made, theirs, ours)

    def facts(self) -> dict[str, Any]:
        """What a report says of both heads, JSON."""
        return {
            "rows": self.grams.rows,
            "zero_rows": len(self.pair.ids) - self.grams.rows,
            "teacher": _facts(self.teacher, self.pair.teacher.norm.kind),
            "student": _facts(self.student, self.pair.student.norm.kind),
        }


def treated(gram: torch.Tensor, *, centred: bool = False) -> Treated:
    """A Gram matrix as it is divided by.

    Where λ_max / λ_min exceeds 1e10, ``1e-8 · tr(G)/D`` is added to the diagonal. The rows of a
    ``centred`` head have no part along (1, …, 1), and neither have the states that its norm lets
    through: that direction is given the mean eigenvalue, which changes no product with such rows.

    Args:
        gram: (D, D) float64.
        centred: whether a LayerNorm stands before the head.

    Raises:
        IncompatibleError: it is zero.

    """
    width = gram.shape[0]
    mean = float(gram.trace()) / width
    if not mean > 0:
        raise IncompatibleError("a head whose shared rows are all zero spans nothing")
    safe = gram + mean / width if centred else gram.clone()
    values = torch.linalg.eigvalsh(safe)
    largest, smallest = float(values[-1]), float(values[0])
    floor = width * torch.finfo(torch.float64).eps * largest
    rank = int((values > floor).sum()) - centred
    condition = largest / smallest if smallest > floor else float("inf")
    ridge = RIDGE * mean if condition > WORST_CONDITION else 0.0
    safe.diagonal().add_(ridge)
    return Treated(torch.linalg.cholesky(safe), condition, rank, ridge)


def _facts(found: Treated, norm: str) -> dict[str, Any]:
    width = found.lower.shape[0]
    finite = found.condition != float("inf")
    return {
        "width": width,
        "rank": found.rank,
        "condition": found.condition if finite else None,
        "ridge": found.ridge,
        "norm": norm,
    }


def _add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add ``rowsᵀ rows`` on and above the blocks of the diagonal."""
    for start in range(0, total.shape[0], BLOCK):
        stop = start + BLOCK
        total[:stop, start:stop].addmm_(rows[:, :stop].T, rows[:, start:stop])


def _mirrored(total: torch.Tensor) -> torch.Tensor:
    for start in range(0, total.shape[0], BLOCK):
        stop = start + BLOCK
        total[start:stop, :start] = total[:start, start:stop].T
    return total


def _zeros(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns, dtype=torch.float64, device=like.device)


def _units(columns: torch.Tensor) -> torch.Tensor:
    lengths: torch.Tensor = torch.linalg.vector_norm(columns, dim=0)
    return columns / lengths
