"""How much each weight matters: S_i = Σ_j |θ_i · ∂L_j/∂θ_i| over seed samples j.

The absolute value is taken per sample, then summed: gradients of two samples never meet.
Source: arXiv 2310.11451, §3.1. On the CPU one Rust pass multiplies, takes the absolute value,
accumulates in float32 and notices NaN; elsewhere torch does the same in row blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pkt import _core

BLOCK_ELEMENTS = 1 << 22  # gradient elements made at once: they stay in cache until they are used

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def accumulate(weight: torch.Tensor, gradient: torch.Tensor, scores: torch.Tensor) -> bool:
    """Add ``|weight · gradient|`` to ``scores``; whether every product is finite.

    Args:
        weight: bfloat16, float16 or float32, contiguous.
        gradient: same shape, one of the same types, contiguous; of ONE sample.
        scores: float32, same shape, contiguous; changed in place.

    """
    if scores.device.type != "cpu":
        added = (weight.float() * gradient.float()).abs_()
        scores += added
        return bool(torch.isfinite(added.sum(dtype=torch.float64)))
    bad = _core.accumulate(*_raw(weight), *_raw(gradient), scores.view(-1).numpy())
    return bad is None


def accumulate_columns(weight: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor) -> bool:
    """Add the column sums of ``|weight · gradient|`` to ``sums``; whether all are finite.

    For embeddings, whose window slides over the hidden axis only: (V, D) scores never exist.

    Args:
        weight: (rows, D) as in `accumulate`.
        gradient: (rows, D).
        sums: (D,) float64; changed in place.

    """
    if sums.device.type != "cpu":
        added = (weight.float() * gradient.float()).abs_().sum(0, dtype=torch.float64)
        sums += added
        return bool(torch.isfinite(added).all())
    columns = weight.shape[-1]
    bad = _core.accumulate_columns(*_raw(weight), *_raw(gradient), columns, sums.numpy())
    return bad is None


def score_sum(scores: torch.Tensor) -> float:
    """Σ of float32 scores in float64, in an order that threads do not change."""
    return float(_core.score_sum(scores.cpu().view(-1).numpy()))


class LayerScores:
    """Scores of one layer's parameters while its gradients pass by (an observer of the sweep).

    Linear weights are scored from X and dY in row blocks of dYᵀX, bit-equal to the gradient
    autograd would have made, which never exists as a whole.

    Args:
        memory: float32 arena for the scores of a layer, or of one matrix at a time.
        on_matrix: called with layer, module and its finished scores, before they are dropped.
        on_layer: makes the layer's record from its index and its score.
        combine: adds to scores, in place, those that other processes have of the same tensor; all
            call it for the same tensors in the same order.

    """

    def __init__(
        self,
        memory: torch.Tensor,
        on_matrix: Callable[[int, str, NDArray[np.float32]], None],
        on_layer: Callable[[int, float], dict[str, Any]],
        combine: Callable[[torch.Tensor], None] = lambda scores: None,
    ) -> None:
        self._memory, self._on_matrix, self._on_layer = memory, on_matrix, on_layer
        self._combine = combine
        self._block = torch.empty(0)
        self._used = 0
        self._scores: dict[str, torch.Tensor] = {}
        self._small: dict[str, torch.Tensor] = {}
        self._totals: dict[str, float] = {}

    def begin_layer(self, layer: int) -> None:
        """Forget what was seen of a layer that was given up."""
        self._used = 0
        for seen in (self._scores, self._small, self._totals):
            seen.clear()

    def linear(self, module: str, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> bool:
        """Score one sample of y = xWᵀ: x (n, in), dy (n, out)."""
        scores = self._scores.get(module)
        if scores is None:
            scores = self._scores[module] = self._take(weight)
        columns = weight.shape[1]
        step = max(1, BLOCK_ELEMENTS // columns)
        block = self._block_for(step * columns, weight)
        finite = True
        for start in range(0, weight.shape[0], step):
            part = slice(start, min(start + step, weight.shape[0]))
            gradient = block[: (part.stop - start) * columns].view(-1, columns)
            torch.mm(dy[:, part].t(), x, out=gradient)
            finite &= accumulate(weight[part], gradient, scores[part])
        return finite

    def parameter(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> bool:
        """Score one sample of any other parameter."""
        if name not in self._small:
            self._small[name] = torch.zeros(weight.shape, device=weight.device)
        return accumulate(weight.contiguous(), gradient.contiguous(), self._small[name])

    def finish_matrix(self, layer: int, module: str, weight: torch.Tensor) -> None:
        """Every sample of this module has been seen: sum, hand out, forget."""
        scores = self._scores.pop(module, None)
        if scores is None:
            scores = self._take(weight)
        self._combine(scores)
        self._totals[module] = score_sum(scores)
        self._on_matrix(layer, module, scores.cpu().numpy())
        if not self._scores:
            self._used = 0

    def finish_layer(self, layer: int) -> dict[str, Any]:
        """The layer's record; its score is the sum over every parameter, norms included."""
        for name in sorted(self._small):
            self._combine(self._small[name])
            self._totals[name] = score_sum(self._small[name])
        total = sum(self._totals[name] for name in sorted(self._totals))
        self._small.clear()
        self._totals.clear()
        return self._on_layer(layer, total)

    def _take(self, weight: torch.Tensor) -> torch.Tensor:
        taken = self._memory[self._used : self._used + weight.numel()]
        self._used += weight.numel()
        return taken.zero_().view(weight.shape)

    def _block_for(self, elements: int, like: torch.Tensor) -> torch.Tensor:
        if self._block.numel() < elements or self._block.dtype != like.dtype:
            self._block = torch.empty(elements, dtype=like.dtype, device=like.device)
        return self._block


def _raw(tensor: torch.Tensor) -> tuple[Any, str]:
    name = _NAMES[tensor.dtype]
    flat = tensor.detach().view(-1)
    return (flat if name == "F32" else flat.view(torch.uint16)).numpy(), name
