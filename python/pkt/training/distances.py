"""How far the student's activations lie from the teacher's, in the three ways of SEMALIGN.

Gu et al., "Beyond Neural Incompatibility", arXiv 2510.24208. `cosine_distances` is its first
version's; `geometry_distance` and `fisher_distances` are our reading of what the abstracts of its
second version and of the Findings of ACL say. All are in float32; targets are constants.
"""

from __future__ import annotations

import torch
from torch.nn import functional

_TINY = 1e-30


def cosine_distances(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """``1 − cos(h, h*)`` of each row, (n,), from 0 to 2.

    Args:
        ours: states of the student, (n, D).
        theirs: targets, (n, D).

    """
    one, other = (functional.normalize(rows, dim=-1, eps=_TINY) for rows in (ours, theirs))
    return 1 - (one * other).sum(-1)


def geometry_distance(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """One minus linear CKA of two sets of rows, from 0 to 1: how they lie to one another.

    ``1 − ⟨K, K*⟩ / (‖K‖ ‖K*‖)`` with ``K = J r rᵀ J``, ``J = I − 11ᵀ/n``; the products come from
    (n, n) or (D, D), whichever is smaller. Rows that are all the same have no geometry: 1.

    Args:
        ours: (n, D), n ≥ 2.
        theirs: (n, D*).

    """
    x, y = _centred(ours), _centred(theirs)
    if len(x) <= min(x.shape[1], y.shape[1]):
        ours_kernel, theirs_kernel = x @ x.T, y @ y.T
        cross = (ours_kernel * theirs_kernel).sum()
    else:
        ours_kernel, theirs_kernel = x.T @ x, y.T @ y
        cross = (x.T @ y).square().sum()
    squares = ours_kernel.square().sum() * theirs_kernel.square().sum()
    return 1 - cross * squares.clamp_min(_TINY).rsqrt()


def fisher_distances(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """``½ Var_p[z − z*]`` with ``p = softmax(z*)`` of each row, (n,), in nats.

    The quadratic form ½ (z − z*)ᵀ F (z − z*) with the Fisher information F = diag(p) − p pᵀ of a
    softmax: KL(p ‖ softmax z) to second order.

    Args:
        ours: logits, (n, V).
        theirs: logits of the target, (n, V).

    """
    p, apart = theirs.softmax(-1), ours - theirs
    mean = (p * apart).sum(-1, keepdim=True)
    return (p * (apart - mean).square()).sum(-1) / 2


def _centred(rows: torch.Tensor) -> torch.Tensor:
    """Less their mean, at a size of about 1: squares of squares neither vanish nor overflow."""
    moved = rows - rows.mean(0)
    size: torch.Tensor = moved.detach().norm()  # a constant: the distance does not depend on it
    return moved / size.clamp_min(_TINY)
