"""W ≈ BA of rank r: the leading singular triplets of a window, split into LoRA factors.

W = UΣVᵀ; split ``paper``: B = U_r Σ_r, A = V_rᵀ; ``balanced``: B = U_r √Σ_r, A = √Σ_r V_rᵀ.
Law: ‖W − BA‖²_F = Σ_{i>r} σ_i². Source: arXiv 2310.11451, §3.2.
"""

from __future__ import annotations

import torch

from pkt.records import Factors, Split

TOLERANCE = 5e-5  # of each σ_i, relative, certified by the residual ‖Wᵀu − σv‖
FULL_BELOW = 1024  # shorter sides this small are decomposed whole


def factorize(weight: torch.Tensor, rank: int, split: Split) -> Factors:
    """The best rank-r factors of ``weight``.

    Args:
        weight: (out_features, in_features), any float type.
        rank: r; clipped to the shorter side.
        split: where the singular values go.

    Returns:
        factors in float32; in each column of U the entry of largest magnitude (the first of
        equals) is positive, so that runs are comparable.

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
        q, r = torch.linalg.qr(gaussian)
        return q * r.diagonal().sign()  # the distribution of Haar, not of Householder's signs

    u, vt = basis(weight.shape[0]), basis(weight.shape[1]).T
    root = sigma if split == "paper" else sigma.sqrt()
    b, a = (u * root, vt) if split == "paper" else (u * root, vt * root[:, None])
    return _factors(weight, b, a, sigma)


def leading_triplets(
    weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (n, r), σ (r,), Vᵀ (r, m) in float64, each σ_i within 1e-4 relative.

    Short sides are decomposed whole. Else block Golub-Kahan: a Krylov basis of WWᵀ grows by
    blocks, each orthogonalised against all before it, until the residual of every wanted
    triplet certifies its σ. Weight spectra decay slowly: a fixed number of power steps is not
    enough, a Krylov basis is.
    """
    if min(weight.shape) <= FULL_BELOW or 4 * rank >= min(weight.shape):
        u, sigma, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        return u[:, :rank], sigma[:rank], vt[:rank]
    if weight.shape[0] > weight.shape[1]:
        v, sigma, ut = leading_triplets(weight.T, rank)
        return ut.T, sigma, v.T
    return _block_krylov(weight.float(), rank)


def _block_krylov(
    weight: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    block = max(2 * rank, 32)
    limit = weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    start = weight @ torch.randn(weight.shape[1], block, generator=generator)
    basis = torch.linalg.qr(start)[0]  # (n, k): orthonormal
    image = weight.T @ basis  # (m, k) = Wᵀ basis
    while True:
        # Rayleigh-Ritz: the SVD of Wᵀ·basis gives the best triplets within the basis.
        gram = (image.T.double() @ image.double()) if image.shape[1] <= limit else None
        assert gram is not None
        values, vectors = torch.linalg.eigh(gram)
        top = vectors[:, -rank:].flip(1)
        sigma = values[-rank:].flip(0).clamp_min(0).sqrt()
        u = basis.double() @ top
        v = (image.double() @ top) / sigma.clamp_min(1e-300)
        residual = (weight @ v.float()).double() - u * sigma
        worst = float((residual.norm(dim=0) / sigma.clamp_min(1e-300)).max())
        if worst <= TOLERANCE or basis.shape[1] + block > limit:
            return u, sigma, v.T
        fresh = weight @ image[:, -block:]
        for _ in range(2):
            fresh = fresh - basis @ (basis.T @ fresh)
        fresh = torch.linalg.qr(fresh)[0]
        fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh))[0]
        basis = torch.cat([basis, fresh], 1)
        image = torch.cat([image, weight.T @ fresh], 1)


def _factors(
    weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor, sigma: torch.Tensor
) -> Factors:
    squared = sum(float(part.double().square().sum()) for part in weight.split(1024))
    error = sum(
        float((part.double() - rows @ a).square().sum())
        for part, rows in zip(weight.split(1024), b.split(1024), strict=True)
    )
    return Factors(
        b=b.float().contiguous(),
        a=a.float().contiguous(),
        singular_values=tuple(sigma.tolist()),
        residual=error**0.5,
        norm=squared**0.5,
    )


def _signs(u: torch.Tensor) -> torch.Tensor:
    magnitude = u.abs()
    largest = magnitude.max(dim=0).values
    first = (magnitude == largest).to(torch.int8).argmax(dim=0)
    return torch.where(u.gather(0, first[None])[0] < 0, -1.0, 1.0).to(u.dtype)
