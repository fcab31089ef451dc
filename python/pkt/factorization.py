"""W ≈ BA of rank r: the leading singular triplets of a window, split into LoRA factors.

W = UΣVᵀ; split ``paper``: B = U_r Σ_r, A = V_rᵀ; ``balanced``: B = U_r √Σ_r, A = √Σ_r V_rᵀ.
Law: ‖W − BA‖²_F = Σ_{i>r} σ_i². Source: arXiv 2310.11451, §3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pkt.config import WHOLE_BELOW, WHOLE_RANKS
from pkt.records import Factors, Split
from pkt.thin import Operand

_Product = Callable[[torch.Tensor], torch.Tensor]

TOLERANCE = 3e-3  # of the residual ‖Wv − σu‖ / σ; σ itself is then right to its square or so
GRADED = 0.03  # of the largest σ: below, what is left outside a basis is rounding soon
NOISE = 1e-6  # of the largest σ: what float32 products leave where the matrix has no more rank
HASHED = 256  # columns of which rows are compared first
KEPT = 0.99  # of the length of a row of norm 1, where it had next to nothing in a basis


def factorize(weight: torch.Tensor, rank: int, split: Split) -> Factors:
    """The best rank-r factors of ``weight``.

    Args:
        weight: (out_features, in_features), any float type; the work is done where it lies.
        rank: r; clipped to the shorter side.
        split: where the singular values go.

    Returns:
        factors in float32 on the CPU; in each column of U the entry of largest magnitude (the
        first of equals) is positive, so that runs are comparable.

    """
    rank = min(rank, *weight.shape)
    u, sigma, vt = leading_triplets(weight, rank)
    sign = _signs(u)
    u, vt = u * sign, vt * sign[:, None]
    if split == "paper":
        b, a = u * sigma, vt
    else:
        root = sigma.sqrt()
        b, a = u * root, vt * root[:, None]
    return _factors(weight, b, a, sigma)


def orthogonal_factors(weight: torch.Tensor, rank: int, split: Split, seed: int) -> Factors:
    """Random orthogonal factors with the window's singular values.

    The control that separates what the teacher knows from how large the start is.
    """
    rank = min(rank, *weight.shape)
    _, sigma, _ = leading_triplets(weight, rank)
    generator = torch.Generator().manual_seed(seed)

    def basis(size: int) -> torch.Tensor:
        gaussian = torch.randn(size, rank, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian.to(weight.device))
        haar: torch.Tensor = q * r.diagonal().sign()  # not the signs of Householder's QR
        return haar

    u, vt = basis(weight.shape[0]), basis(weight.shape[1]).T
    root = sigma if split == "paper" else sigma.sqrt()
    b, a = (u * root, vt) if split == "paper" else (u * root, vt * root[:, None])
    return _factors(weight, b, a, sigma)


def leading_triplets(
    weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (n, r), σ (r,), Vᵀ (r, m) in float64, each σ_i within 1e-4 relative.

    (Within 5e-4 where dozens of them lie within a few percent around σ_r.)
    Short sides are decomposed whole. Rows that occur c times, as those of grouped keys and values
    do, are taken once, times √c: Σ and V are the same. A block Krylov basis grows until the
    residual of every wanted triplet is small. Weight spectra decay slowly: a fixed number of
    power steps is not enough (Musco and Musco, arXiv 1504.05477).
    """
    if min(weight.shape) <= WHOLE_BELOW or WHOLE_RANKS * rank >= min(weight.shape):
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        return u[:, :rank], sigma[:rank], vt[:rank]
    kinds = _distinct_rows(weight)
    if kinds is not None and len(kinds[0]) >= WHOLE_RANKS * rank:
        first, kind, times = kinds
        root = times.double().sqrt()[:, None]
        u, sigma, vt = leading_triplets((weight[first].double() * root).float(), rank)
        return (u / root)[kind], sigma, vt
    stored = weight if weight.dtype == torch.bfloat16 else weight.float()
    low, high = torch.aminmax(stored)
    scale = float(max(-low, high))  # squares of tiny weights would underflow
    if scale == 0.0:
        u, v = (torch.eye(n, rank, device=weight.device).double() for n in weight.shape)
        return u, u.new_zeros(rank), v.T
    operand = Operand(stored)
    up, down = operand.times, operand.times_transpose
    wide = weight.shape[0] <= weight.shape[1]
    apply, back = (up, down) if wide else (down, up)
    u, sigma, vt = _block_krylov(
        lambda rows: apply(rows).div_(scale),
        lambda rows: back(rows).div_(scale),
        (min(weight.shape), max(weight.shape)),
        rank,
        weight.device,
    )
    return (u, sigma * scale, vt) if wide else (vt.T, sigma * scale, u.T)


def _distinct_rows(
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Which rows differ: the first of each kind, every row's kind, and how often each occurs.

    ``None`` unless each occurs twice or more on average. Rows that begin alike, by a sum of their
    bits times random integers modulo 2⁶⁴, must be alike to the end.
    """
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        weight.element_size()
    ]
    generator, count = torch.Generator().manual_seed(0), len(weight)
    begin = weight[:, :HASHED].contiguous().view(integers).long()
    factors = torch.randint(-(2**62), 2**62, begin.shape[1:], generator=generator)
    sums = (begin * factors.to(weight.device)).sum(1)
    _, kind, times = sums.unique(return_inverse=True, return_counts=True)
    if 2 * len(times) > count:
        return None
    places = torch.arange(count, device=weight.device)
    first = torch.full_like(times, count).scatter_reduce_(0, kind, places, "amin")
    pairs = zip(weight.split(64), first[kind].split(64), strict=True)  # parts stay in cache
    if not all(torch.equal(part, weight[same]) for part, same in pairs):
        return None
    return first, kind, times


def _block_krylov(
    times: _Product,
    times_transpose: _Product,
    shape: tuple[int, int],
    rank: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triplets of a wide matrix W (n, m), n ≤ m, from a Krylov basis of WWᵀ.

    ``times`` gives the rows xW (b, m) of rows x (b, n), ``times_transpose`` those of xWᵀ (b, n).
    The basis grows by blocks of orthonormal rows Q; its Gram matrix QW(QW)ᵀ gives the best
    triplets within it (Rayleigh-Ritz). What QWWᵀ of the last block leaves outside the basis, which
    the next block is made of, is what the residuals should be; before they count as small a
    product of their own shows what they are.
    """
    size, width = shape
    block, generator = rank + 2, torch.Generator().manual_seed(0)
    start = torch.randn(block, width, generator=generator).to(device)
    basis, image = _Rows(size, device), _Rows(width, device)  # (k, n) and (k, m)
    gram = torch.empty(0, 0, dtype=torch.float64, device=device)
    found = outside = times_transpose(start)
    look, seen = 4 * block, None
    while True:
        block = min(block, size - basis.count)
        longest = found.norm(dim=1).max()
        fresh = _orthonormal(outside[:block], longest, basis.all(), generator)
        basis.append(fresh)
        image.append(times(fresh))
        gram = _bordered(gram, image.last(block) @ image.all().T)
        found = times_transpose(image.last(block))
        outside = _outside(found, basis.all())
        full = basis.count == size
        if basis.count < look and not full:
            continue
        values, vectors = torch.linalg.eigh(gram)
        sigma = values[-rank:].flip(0).clamp_min(0).sqrt()
        known = sigma > NOISE * sigma[0]
        top, shown = vectors[:, -rank:].flip(1), sigma[known]
        expected = outside.double().T @ top[-block:, known] / shown**2
        largest = float(expected.norm(dim=0).max())
        if full or largest <= TOLERANCE or float(shown[-1]) < GRADED * float(shown[0]):
            u, v = basis.all().T @ top.float(), image.all().T @ (top[:, known] / shown).float()
            residual = times_transpose(v.T).T - u[:, known] * shown.float()
            largest = float((residual.norm(dim=0) / shown).max())
            if full or largest <= TOLERANCE:
                break
        look, seen = _next_look(basis.count, largest, seen), (basis.count, largest)
    u = basis.all().double().T @ top
    v = image.all().double().T @ (top[:, known] / shown)
    return u, sigma * known, _completed(v, rank, generator).T


def _bordered(gram: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix (k, k), and its next rows (b, k + b) from which it grows to (k + b)²."""
    inner, outer = len(gram), rows.shape[1]
    grown = gram.new_empty(outer, outer)
    grown[:inner, :inner] = gram
    grown[inner:] = rows
    grown[:inner, inner:] = rows[:, :inner].T
    return grown


def _completed(v: torch.Tensor, rank: int, generator: torch.Generator) -> torch.Tensor:
    """``rank`` orthonormal columns, the first of them those of ``v``: the rest go with σ = 0."""
    missing = rank - v.shape[1]
    if not missing:
        return v
    drawn = torch.randn(v.shape[0], missing, generator=generator, dtype=v.dtype).to(v.device)
    return torch.cat([v, torch.linalg.qr(torch.cat([v, drawn], dim=1))[0][:, v.shape[1] :]], dim=1)


class _Rows:
    """Rows that are appended by blocks, in memory that grows by half."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.count = 0
        self._held = torch.empty(0, length, device=device)

    def all(self) -> torch.Tensor:
        return self._held[: self.count]

    def last(self, count: int) -> torch.Tensor:
        return self._held[self.count - count : self.count]

    def append(self, rows: torch.Tensor) -> None:
        needed = self.count + rows.shape[0]
        if needed > self._held.shape[0]:
            held = self._held.new_empty(max(needed, 256, needed * 3 // 2), self._held.shape[1])
            held[: self.count] = self.all()
            self._held = held
        self._held[self.count : needed] = rows
        self.count = needed


def _next_look(width: int, residual: float, before: tuple[int, float] | None) -> int:
    """The width of the basis at which the residual should have fallen to `TOLERANCE`.

    A straight line through the logarithms of the last two, held between an eighth more and
    half more than there is: early residuals fall slowly, late ones fast.
    """
    least, most = width + max(width // 8, 1), width + width // 2
    if before is None or not residual < before[1]:
        return most
    steps = math.log(residual / TOLERANCE) / math.log(before[1] / residual)
    return min(max(width + int(steps * (width - before[0])), least), most)


def _outside(rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What ``rows`` have outside the span of the orthonormal rows of ``basis``."""
    return rows - (rows @ basis.T) @ basis


def _orthonormal(
    rows: torch.Tensor, before: torch.Tensor, basis: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Orthonormal rows for ``rows``, which lay outside ``basis``; the largest was ``before`` long.

    Rows that lay in the span but for rounding (a rank-deficient matrix has no others left) are
    replaced by random ones: what they find is then the null space, with σ = 0. What rounding has
    left of the span is removed until a removal shortens no row by much: once, nearly always.
    """
    spent = rows.norm(dim=1) <= 1e-4 * before
    if bool(spent.any()):
        drawn = torch.randn(int(spent.sum()), rows.shape[1], generator=generator)
        rows = rows.masked_scatter(spent[:, None], drawn.to(rows.device))
    for _ in range(4):
        rows = _outside(torch.linalg.qr(rows.T)[0].T, basis)
        if float(rows.norm(dim=1).min()) > KEPT:
            break
    made: torch.Tensor = torch.linalg.qr(rows.T)[0].T
    return made


def _factors(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, sigma: torch.Tensor
) -> Factors:
    a = a.double()
    squared = error = 0.0
    for part, rows in zip(weight.split(64), b.double().split(64), strict=True):  # stays in cache
        exact = part.double()
        squared += float(torch.linalg.vector_norm(exact)) ** 2
        error += float(torch.linalg.vector_norm(torch.addmm(exact, rows, a, alpha=-1.0))) ** 2
    return Factors(
        b=b.float().cpu().contiguous(),
        a=a.float().cpu().contiguous(),
        singular_values=tuple(sigma.tolist()),
        residual=error**0.5,
        norm=squared**0.5,
    )


def _signs(u: torch.Tensor) -> torch.Tensor:
    magnitude = u.abs()
    largest = magnitude.max(dim=0).values
    first = (magnitude == largest).to(torch.int8).argmax(dim=0)
    return torch.where(u.gather(0, first[None])[0] < 0, -1.0, 1.0).to(u.dtype)
