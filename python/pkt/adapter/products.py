"""Arithmetic on low-rank products BA by their factors; the (out, in) matrix is never made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pkt.records import LowRank


@dataclass(frozen=True, slots=True)
class Compressed:
    """The best approximation of a product by one of smaller rank."""

    factors: LowRank
    error: float  #: ‖Δ − Δ_N‖_F
    norm: float  #: ‖Δ‖_F

    @property
    def relative(self) -> float:
        """‖Δ − Δ_N‖_F / ‖Δ‖_F; 0 of nothing."""
        return self.error / self.norm if self.norm else 0.0


def side_by_side(
    trained: Mapping[str, LowRank], frozen: Mapping[str, LowRank]
) -> dict[str, LowRank]:
    """``[B | −B₀]`` and ``[A ; A₀]``: one LoRA whose product is BA − B₀A₀.

    Args:
        trained: (A, B) by module.
        frozen: (A₀, B₀) by module. A module that only one of the two names keeps its rank: BA
            alone, or −B₀A₀.

    """
    joined = dict(trained)
    for name, start in frozen.items():
        if name in trained:
            b = torch.cat([trained[name].b, -start.b], dim=1)
            a = torch.cat([trained[name].a, start.a], dim=0)
            joined[name] = LowRank(b, a)
        else:
            joined[name] = LowRank(-start.b, start.a)
    return joined


def recompress(factors: LowRank, rank: int) -> Compressed:
    """The best product of rank N = ``rank`` in the Frobenius norm (Eckart-Young).

    ``B = Q_B R_B``, ``Aᵀ = Q_A R_A`` and ``R_B R_Aᵀ = UΣVᵀ`` in float64, O((out + in) r²); the
    result is ``Q_B U √Σ`` and ``√Σ Vᵀ Q_Aᵀ``, cut to N and rounded to float32. The error is
    √Σ_{i>N} σ_i². Factors of rank N or less stay as they are.

    Args:
        factors: B (out, r) and A (r, in).
        rank: N, at least 1.

    """
    held = int(factors.a.shape[0])
    if held <= rank:
        return Compressed(factors, 0.0, product_norm(factors))
    q_b, r_b = torch.linalg.qr(factors.b.double())
    q_a, r_a = torch.linalg.qr(factors.a.double().T)
    u, sigma, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    b = (q_b @ (u[:, :rank] * root)).float()
    a = ((root[:, None] * vt[:rank]) @ q_a.T).float()
    error, norm = float(sigma[rank:].norm()), float(sigma.norm())
    return Compressed(LowRank(b.contiguous(), a.contiguous()), error, norm)


def product_norm(half: LowRank) -> float:
    """‖BA‖_F = √tr(BᵀB · AAᵀ), in float64."""
    b, a = half.b.double(), half.a.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))
