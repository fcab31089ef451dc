"""How much each weight matters: S_i = Σ_j |θ_i · ∂L_j/∂θ_i| over seed samples j.

The absolute value is taken per sample, then summed: gradients of two samples never meet.
Source: arXiv 2310.11451, §3.1. One pass multiplies, takes the absolute value, accumulates in
float32 and notices NaN: in Rust on the CPU, in Triton on CUDA (see `pkt.sensitivity.device`).
bfloat16 samples of linear layers are scored on the CPU without their gradients ever being in
memory: dYᵀX is made in registers, tile by tile, for all samples of a batch while the scores of a
tile are in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pkt import _core
from pkt.host import multiplies_in_registers
from pkt.products import multiplied_in
from pkt.sensitivity import device

# Gradient elements made at once: on the CPU they stay in cache until they are used; a device is
# given enough to do for what it costs to start it. Never derived from a budget: a product in
# blocks of another size may round otherwise.
BLOCK_ELEMENTS = 1 << 22
DEVICE_BLOCK_ELEMENTS = 1 << 24

#: Whether all is finite. On a device a bool tensor: asking for its truth waits for the device.
Finite = bool | torch.Tensor

_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def accumulate(weight: torch.Tensor, gradient: torch.Tensor, scores: torch.Tensor) -> Finite:
    """Add ``|weight · gradient|`` to ``scores``; whether every score is finite then.

    Args:
        weight: bfloat16, float16 or float32, contiguous.
        gradient: same shape, one of the same types, contiguous; of ONE sample.
        scores: float32, same shape, contiguous; changed in place.

    """
    bad = _nothing_bad(scores)
    _accumulate(weight, gradient, scores, bad)
    return _finite(bad)


def accumulate_columns(weight: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor) -> Finite:
    """Add the column sums of ``|weight · gradient|`` to ``sums``; whether all products are finite.

    For embeddings, whose window slides over the hidden axis only: (V, D) scores never exist.

    Args:
        weight: (rows, D) as in `accumulate`.
        gradient: (rows, D).
        sums: (D,) float64; changed in place.

    """
    if sums.device.type == "cpu":
        columns = weight.shape[-1]
        return (
            _core.accumulate_columns(*_raw(weight), *_raw(gradient), columns, sums.numpy()) is None
        )
    bad = _nothing_bad(sums)
    device.accumulate_columns(weight, gradient, sums, bad)
    return _finite(bad)


def made_in_registers(weight: torch.Tensor) -> bool:
    """Whether the gradients of ``weight`` are made by `accumulate_products`: bfloat16, on a CPU."""
    kind = weight.dtype, weight.device.type
    return kind == (torch.bfloat16, "cpu") and multiplies_in_registers()


def accumulate_products(
    weight: torch.Tensor,
    xs: Sequence[torch.Tensor],
    dys: Sequence[torch.Tensor],
    scores: torch.Tensor,
    *,
    fresh: bool = False,
) -> int | None:
    """Add ``|weight · dyᵀx|`` of each sample to ``scores``, in their order, on the CPU.

    Each element of a gradient is summed over the tokens in order by fused multiply-adds in
    float32, whatever the number of threads; no gradient is in memory.

    Args:
        weight: (out, in) bfloat16, float16 or float32, contiguous.
        xs: (n, in) bfloat16 of each sample.
        dys: (n, out) bfloat16 of each sample.
        scores: (out, in) float32, contiguous; changed in place.
        fresh: the scores are zeros, whatever lies there.

    Returns:
        the first sample after which a score is not finite.

    """
    inputs, upstream = ([_raw(each.contiguous())[0] for each in side] for side in (xs, dys))
    flat = scores.view(-1).numpy()
    return _core.accumulate_products(*_raw(weight), weight.shape[1], inputs, upstream, flat, fresh)


def scorer(on: torch.device) -> str:
    """What scores there, in words: "Rust", "Triton", or "torch" and why."""
    return device.scorer(on.type)[1]


def _accumulate(
    weight: torch.Tensor, gradient: torch.Tensor, scores: torch.Tensor, bad: torch.Tensor
) -> None:
    """`accumulate`, which sets ``bad`` or leaves it alone."""
    if scores.device.type != "cpu":
        device.accumulate(weight, gradient, scores, bad)
    elif _core.accumulate(*_raw(weight), *_raw(gradient), scores.view(-1).numpy()) is not None:
        bad.fill_(1)


def _nothing_bad(like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=like.device)


def _finite(bad: torch.Tensor) -> Finite:
    finite = bad[0] == 0
    return bool(finite) if bad.device.type == "cpu" else finite


def score_sum(scores: torch.Tensor) -> float:
    """Σ of float32 scores in float64, in an order that threads do not change."""
    return float(_core.score_sum(scores.cpu().view(-1).numpy()))


class LayerScores:
    """Scores of one layer's parameters while its gradients pass by (an observer of the sweep).

    Linear weights are scored from X and dY; dYᵀX never exists as a whole. It is bit-equal to the
    gradient that autograd would have made, but for bfloat16 on a CPU: there it is what autograd
    would have rounded to bfloat16, in float32 (`accumulate_products`).

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

    def linear(
        self,
        module: str,
        weight: torch.Tensor,
        xs: Sequence[torch.Tensor],
        dys: Sequence[torch.Tensor],
    ) -> Sequence[Finite]:
        """Score samples of y = xWᵀ, each x (n, in) and dy (n, out); whether each is finite."""
        in_registers = made_in_registers(weight)
        scores = self._scores.get(module)
        fresh = scores is None
        if scores is None:
            scores = self._scores[module] = self._take(weight, cleared=not in_registers)
        if in_registers:
            bad = accumulate_products(weight, xs, dys, scores, fresh=fresh)
            return [bad is None or number < bad for number in range(len(xs))]
        pairs = zip(xs, dys, strict=True)
        return [self._in_blocks(weight, x, dy, scores) for x, dy in pairs]

    def _in_blocks(
        self, weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor, scores: torch.Tensor
    ) -> Finite:
        """Score one sample by row blocks of its gradient."""
        columns = weight.shape[1]
        on_cpu = scores.device.type == "cpu"
        step = max(1, (BLOCK_ELEMENTS if on_cpu else DEVICE_BLOCK_ELEMENTS) // columns)
        kind = multiplied_in(weight.dtype, weight.device)
        block = self._block_for(step * columns, weight, kind)
        x = x.to(kind)
        bad = _nothing_bad(scores)
        for start in range(0, weight.shape[0], step):
            part = slice(start, min(start + step, weight.shape[0]))
            gradient = block[: (part.stop - start) * columns].view(-1, columns)
            torch.mm(dy[:, part].to(kind).t(), x, out=gradient)
            _accumulate(weight[part], gradient, scores[part], bad)
        return _finite(bad)

    def parameter(self, name: str, weight: torch.Tensor, gradient: torch.Tensor) -> Finite:
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
        here = scores.cpu()
        self._totals[module] = score_sum(here)
        self._on_matrix(layer, module, here.numpy())
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

    def _take(self, weight: torch.Tensor, *, cleared: bool = True) -> torch.Tensor:
        taken = self._memory[self._used : self._used + weight.numel()]
        self._used += weight.numel()
        return (taken.zero_() if cleared else taken).view(weight.shape)

    def _block_for(self, elements: int, like: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        if self._block.numel() < elements or self._block.dtype != kind:
            self._block = torch.empty(elements, dtype=kind, device=like.device)
        return self._block


def _raw(tensor: torch.Tensor) -> tuple[Any, str]:
    name = _NAMES[tensor.dtype]
    flat = tensor.detach().view(-1)
    return (flat if name == "F32" else flat.view(torch.uint16)).numpy(), name
