"""Where training begins: an extracted start, or one of the controls beside it.

========== ===================================== =========================
init       B₀, A₀                                source
========== ===================================== =========================
a folder   what `pkt extract` wrote              arXiv 2310.11451
lora       B₀ = 0, A₀ uniform; nothing frozen    arXiv 2106.09685
pissa      the student's own leading triplets    arXiv 2404.02948
gaussian   Gaussian factors of a given norm      methods' control for size
========== ===================================== =========================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pkt.adapter import product_norm
from pkt.factorization import factorize
from pkt.records import LowRank
from pkt.selection import mix_seed

Norms = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class Form:
    """How a start is used: ``residual``, ``scaled`` (B₀A₀ times ``scale``) or ``a-only``."""

    name: str = "residual"
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Halves:
    """What training begins from and what is subtracted; ``frozen`` is ``None`` if nothing is."""

    trained: Mapping[str, LowRank]
    frozen: Mapping[str, LowRank] | None


def ordinary(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Halves:
    """PEFT's own start: A uniform within ±1/√in, B zero, so that BA = 0."""
    trained = {}
    for name, (rows, columns) in shapes.items():
        r = min(rank, rows, columns)
        a = torch.empty(r, columns).uniform_(-1, 1, generator=_generator(seed, name))
        trained[name] = LowRank(torch.zeros(rows, r), a / math.sqrt(columns))
    return Halves(trained, None)


def principal(
    weights: Mapping[str, torch.Tensor], rank: int, norms: Norms | None = None
) -> dict[str, LowRank]:
    """The student's own leading singular triplets, √Σ in both factors (PiSSA).

    Args:
        weights: of each module, (out_features, in_features).
        rank: r, clipped to a matrix's shorter side.
        norms: ‖B₀A₀‖_F to scale to; ``None``: as they are.

    """
    start = {}
    for name, weight in weights.items():
        factors = factorize(weight, rank, "balanced")
        start[name] = _scaled(factors.b, factors.a, norms(name) if norms else None)
    return start


def gaussian(
    weights: Mapping[str, torch.Tensor], rank: int, seed: int, norms: Norms | None = None
) -> dict[str, LowRank]:
    """Gaussian factors with ‖B₀A₀‖_F as ``norms`` says, or as `principal` has it.

    Arguments as there; ``seed`` and the module's name choose the numbers.
    """
    start = {}
    for name, weight in weights.items():
        rows, columns = weight.shape
        r = min(rank, rows, columns)
        norm = norms(name) if norms else leading_norm(weight, r)
        generator = _generator(seed, name)
        b = torch.randn(rows, r, generator=generator)
        a = torch.randn(r, columns, generator=generator)
        balance = (columns / rows) ** 0.25  # both factors get the same norm
        start[name] = _scaled(b * balance, a / balance, norm)
    return start


def leading(start: Mapping[str, LowRank], rank: int) -> dict[str, LowRank]:
    """The first ``rank`` directions of an extracted start: its leading singular triplets."""
    return {n: LowRank(half.b[:, :rank], half.a[:rank]) for n, half in start.items()}


def halves(start: Mapping[str, LowRank], form: Form) -> Halves:
    """The two halves of a start that is used as ``form`` says.

    ``residual``: both are (B₀, A₀). ``scaled``: both times √c, so that their product is c·B₀A₀.
    ``a-only``: A's rows are A₀'s directions at the norm of an ordinary start (1/√3 a row), B = 0
    and nothing is frozen: a plain LoRA that begins in the start's subspace.
    """
    if form.name == "a-only":
        return Halves({name: _directions(half) for name, half in start.items()}, None)
    root = math.sqrt(form.scale)
    both = {name: LowRank(half.b * root, half.a * root) for name, half in start.items()}
    return Halves(both, both)


def leading_norm(weight: torch.Tensor, rank: int) -> float:
    """‖W_r‖_F of the best rank-r approximation: √Σ σ_i²."""
    return math.hypot(*factorize(weight, rank, "paper").singular_values)


def _directions(half: LowRank) -> LowRank:
    rows = half.a / half.a.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return LowRank(torch.zeros_like(half.b), rows / math.sqrt(3))


def _scaled(b: torch.Tensor, a: torch.Tensor, norm: float | None) -> LowRank:
    if norm is None:
        return LowRank(b, a)
    held = product_norm(LowRank(b, a))
    root = math.sqrt(norm / held) if held else 0.0
    return LowRank(b * root, a * root)


def _generator(seed: int, name: str) -> Any:
    return torch.Generator().manual_seed(mix_seed(seed, name))
