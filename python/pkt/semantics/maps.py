"""The maps by name: each one matrix M (D_S × D_T) that carries a teacher's state to the student.

v1 takes a state apart over unit basis vectors, ``a = Ŝ_Tᵀ h / ‖h‖``, and puts it together in the
student, ``h̃ = Ŝ_S a``: up to a positive scale that is ``M h`` with ``M = Ŝ_S Ŝ_Tᵀ``, or
``G_S⁻¹ [W_Sᵀ diag(1/(n^S_i n^T_i)) W_T] G_T⁻¹``. A map's scale means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from pkt.semantics.bases import Bases

STATES_RIDGE = 1e-2  # of `ridge`, in mean eigenvalues of the states' Gram matrix
DEFAULT_MAPS = ("cosine", "dual", "embedding", "random", "truncate")


@dataclass(frozen=True)
class Evidence:
    """What a map is made from; a map's kind says which part it needs."""

    sizes: tuple[int, int]  #: D_T, D_S
    bases: Bases | None = None  #: of the heads, or of the input embeddings
    states: tuple[torch.Tensor, torch.Tensor] | None = None  #: (n, D_T), (n, D_S) of one layer pair
    channels: torch.Tensor | None = (
        None  #: (D_T,) gradient × activation of the pair's teacher layer
    )
    seed: int = 0


@dataclass(frozen=True)
class MapKind:
    """A map that can be asked for by name."""

    needs: Literal["head", "embedding", "states", "channels", "sizes"]  #: "channels": states too
    make: Callable[[Evidence], torch.Tensor]  #: M (D_S, D_T) float64
    about: str

    @property
    def fitted(self) -> bool:
        """Whether each layer pair has a map of its own, fitted on its states."""
        return self.needs in ("states", "channels")


def _cosine(given: Evidence) -> torch.Tensor:
    """``Ŝ_S Ŝ_Tᵀ``: v1's map; not the identity where both models are one."""
    return _bases(given).recomposed.map


def _dual(given: Evidence) -> torch.Tensor:
    """``W_S⁺ W_T = G_S⁻¹ W_Sᵀ W_T``: the state whose logits are nearest the teacher's."""
    bases = _bases(given)
    return bases.student.solve(bases.grams.cross)


def _ridge(given: Evidence) -> torch.Tensor:
    """``X_Sᵀ X_T (X_Tᵀ X_T + λI)⁻¹``: least squares on paired states."""
    theirs, ours = _states(given)
    count, width = theirs.shape
    ridge = STATES_RIDGE * float(theirs.square().sum()) / width
    if count < width:  # the same by the smaller of both Gram matrices
        kernel = theirs @ theirs.T
        kernel.diagonal().add_(ridge)
        solved: torch.Tensor = torch.linalg.solve(kernel, theirs)
        return ours.T @ solved
    gram = theirs.T @ theirs
    gram.diagonal().add_(ridge)
    fitted: torch.Tensor = torch.linalg.solve(gram, theirs.T @ ours)
    return fitted.T


def _procrustes(given: Evidence) -> torch.Tensor:
    """A rotation fitted on paired states: ``c UVᵀ``, ``X_Sᵀ X_T = UΣVᵀ``, ``c = tr Σ / ‖X_T‖²``."""
    theirs, ours = _states(given)
    out, small = torch.linalg.qr(ours.T)
    into, other = torch.linalg.qr(theirs.T)
    u, sigma, vh = torch.linalg.svd(small @ other.T, full_matrices=False)
    live = sigma > sigma[0] * max(small.shape) * torch.finfo(sigma.dtype).eps
    turned: torch.Tensor = (out @ u[:, live]) @ (vh[live] @ into.T)
    return turned * float(sigma.sum() / theirs.square().sum())


def _flex(given: Evidence) -> torch.Tensor:
    """``c P``: the D_S channels of highest gradient × activation, ascending (ties: the lower one).

    ``c = ‖X_S‖_F / ‖X_T Pᵀ‖_F`` gives them the size of the student's states.
    """
    assert given.channels is not None, "this map is made from the channels of a layer"
    theirs, ours = _states(given)
    wide, narrow = theirs.shape[1], ours.shape[1]
    order = given.channels.double().cpu().sort(descending=True, stable=True).indices
    kept = order[:narrow].sort().values.to(theirs.device)
    scale = float(ours.norm() / theirs[:, kept].norm().clamp_min(1e-300))
    made = torch.zeros(narrow, wide, dtype=torch.float64, device=theirs.device)
    made[torch.arange(len(kept)), kept] = scale
    return made


def _random(given: Evidence) -> torch.Tensor:
    """Independent Gaussian entries."""
    draw = torch.Generator().manual_seed(given.seed)
    teacher, student = given.sizes
    entries = torch.randn(student, teacher, generator=draw, dtype=torch.float64)
    return entries.mul_(1 / math.sqrt(teacher))


def _truncate(given: Evidence) -> torch.Tensor:
    """The first D_S channels as they are."""
    teacher, student = given.sizes
    return torch.eye(student, teacher, dtype=torch.float64)


MAPS: dict[str, MapKind] = {
    "cosine": MapKind("head", _cosine, "v1: apart and together over unit basis vectors"),
    "dual": MapKind("head", _dual, "the student's state of nearest logits"),
    "ridge": MapKind("states", _ridge, "least squares on paired states, a map for each pair"),
    "procrustes": MapKind("states", _procrustes, "a rotation fitted on them, one for each pair"),
    "flex": MapKind("channels", _flex, "control: the channels of highest attribution, scaled"),
    "embedding": MapKind("embedding", _cosine, "control: v1 over the rows of the input embeddings"),
    "random": MapKind("sizes", _random, "control: Gaussian entries"),
    "truncate": MapKind("sizes", _truncate, "control: the first channels as they are"),
}


def _bases(given: Evidence) -> Bases:
    assert given.bases is not None, "this map is made from bases"
    return given.bases


def _states(given: Evidence) -> tuple[torch.Tensor, torch.Tensor]:
    assert given.states is not None, "this map is made from paired states"
    theirs, ours = given.states
    return theirs.double(), ours.double()
