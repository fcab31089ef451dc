"""W ≈ BA of rank r: the leading singular triplets of a window, split into LoRA factors.

W = UΣVᵀ; split ``paper``: B = U_r Σ_r, A = V_rᵀ; ``balanced``: B = U_r √Σ_r, A = √Σ_r V_rᵀ.
Law: ‖W − BA‖²_F = Σ_{i>r} σ_i². Source: arXiv 2310.11451, §3.2.
"""

from __future__ import annotations

import torch

from pkt.records import Factors, Split

TOLERANCE = 1e-3  # of the residual ‖Wv − σu‖ / σ; σ itself is then right to its square or so
FULL_BELOW = 384  # shorter sides this small are decomposed whole


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

    Short sides are decomposed whole. Else a block Krylov basis grows until the residual of
    every wanted triplet is small. Weight spectra decay slowly: a fixed number of power steps is
    not enough (Musco and Musco, arXiv 1504.05477).
    """
    if min(weight.shape) <= FULL_BELOW or 4 * rank >= min(weight.shape):
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        return u[:, :rank], sigma[:rank], vt[:rank]
    if weight.shape[0] > weight.shape[1]:
        v, sigma, ut = leading_triplets(weight.T, rank)
        return ut.T, sigma, v.T
    single = weight.float()
    scale = float(single.abs().max()) or 1.0  # squares of tiny weights would underflow
    u, sigma, vt = _block_krylov(single / scale, rank)
    return u, sigma * scale, vt


def _block_krylov(
    weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triplets of a wide float32 matrix (n, m), n ≤ m, from a Krylov basis of WWᵀ.

    The basis grows by blocks of orthonormal rows Q; its Gram matrix QW(QW)ᵀ gives the best
    triplets within it (Rayleigh-Ritz), looked at whenever it has grown by a quarter.
    """
    size = weight.shape[0]
    block, generator = max(2 * rank, 32), torch.Generator().manual_seed(0)
    start = torch.randn(block, weight.shape[1], generator=generator).to(weight.device)
    fresh = _orthonormal(start @ weight.T, start.new_empty(0, size), generator)
    basis, image = fresh, fresh @ weight  # (k, n) and (k, m)
    look = 2 * block
    while True:
        full = basis.shape[0] + block > size
        if basis.shape[0] >= look or full:
            look = basis.shape[0] * 5 // 4
            values, vectors = torch.linalg.eigh((image @ image.T).double())
            sigma = values[-rank:].flip(0).clamp_min(1e-300).sqrt()
            top = vectors[:, -rank:].flip(1)
            u = basis.double().T @ top
            v = (image.double().T @ top) / sigma
            residual = (weight @ v.float()).double() - u * sigma
            if full or float((residual.norm(dim=0) / sigma).max()) <= TOLERANCE:
                return u, sigma, v.T
        fresh = _orthonormal(image[-block:] @ weight.T, basis, generator)
        basis = torch.cat([basis, fresh])
        image = torch.cat([image, fresh @ weight])


def _orthonormal(
    rows: torch.Tensor, basis: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """``rows`` made orthonormal, and orthogonal to the rows of ``basis``.

    Rows that lie in the span already (a rank-deficient matrix has no others left) are replaced
    by random ones: what they find is then the null space, with σ = 0.
    """
    before = rows.norm(dim=1).max()
    rows = rows - (rows @ basis.T) @ basis
    spent = rows.norm(dim=1) <= 1e-4 * before
    if bool(spent.any()):
        drawn = torch.randn(int(spent.sum()), rows.shape[1], generator=generator)
        rows[spent] = drawn.to(rows.device)
    for _ in range(3):
        q, _ = torch.linalg.qr(rows.T)
        rows = q.T - (q.T @ basis.T) @ basis
    made: torch.Tensor = torch.linalg.qr(rows.T)[0].T
    return made


def _factors(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, sigma: torch.Tensor
) -> Factors:
    squared = sum(float(part.double().square().sum()) for part in weight.split(1024))
    error = sum(
        float((part.double() - rows @ a).square().sum())
        for part, rows in zip(weight.split(1024), b.split(1024), strict=True)
    )
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
