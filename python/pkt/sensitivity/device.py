"""Scoring where the CPU cannot reach: by the Triton kernels on CUDA, else by torch in row blocks.

Either adds the same bits to scores. Neither waits for the device, nor makes a float32 copy of a
whole tensor. That something was not finite is left in ``bad``, an int32 of the device.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

ROW_ELEMENTS = 1 << 20  # float32 products that torch makes at once


def accumulate(
    weight: torch.Tensor, gradient: torch.Tensor, scores: torch.Tensor, bad: torch.Tensor
) -> None:
    """Add ``|weight · gradient|`` to ``scores``; set ``bad`` where a score is not finite then.

    Args:
        weight: bfloat16, float16 or float32, contiguous.
        gradient: same shape, one of the same types, contiguous.
        scores: float32, same shape, contiguous; changed in place.
        bad: int32, one element; set to 1 or left alone.

    """
    _require_same(weight, gradient, scores)
    flat = weight.detach().view(-1), gradient.detach().view(-1), scores.view(-1)
    kernels, _ = scorer(scores.device.type)
    (kernels.accumulate if kernels else torch_accumulate)(*flat, bad)


def accumulate_columns(
    weight: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor, bad: torch.Tensor
) -> None:
    """Add the column sums of ``|weight · gradient|`` to ``sums``; set ``bad`` as `accumulate`.

    Args:
        weight: (rows, D), as in `accumulate`.
        gradient: (rows, D).
        sums: (D,) float64; changed in place.
        bad: int32, one element; set to 1 if a product is not finite.

    """
    _require_same(weight, gradient, sums.expand(weight.shape[0], -1))
    columns = weight.shape[1]
    rows = weight.detach().view(-1, columns), gradient.detach().view(-1, columns)
    kernels, _ = scorer(sums.device.type)
    (kernels.accumulate_columns if kernels else torch_accumulate_columns)(*rows, sums, bad)


@functools.cache
def scorer(device: str) -> tuple[ModuleType | None, str]:
    """The module of kernels for a type of device, if they run there, and what scores, in words."""
    if device == "cpu":
        return None, "Rust"
    if device != "cuda":
        return None, "torch"
    try:
        from pkt.sensitivity import kernels

        ones = torch.ones(1, device=device)
        kernels.accumulate(ones, ones, ones.clone(), torch.zeros(1, dtype=torch.int32).to(device))
    except ImportError:
        return None, "torch: triton is not installed"
    except Exception as error:  # it needs a C compiler, among other things, and says so anyhow
        reason = " ".join(str(error).split())[:200]
        return None, f"torch: triton does not run here: {type(error).__name__} {reason}".rstrip()
    return kernels, "Triton"


def torch_accumulate(
    weight: torch.Tensor, gradient: torch.Tensor, scores: torch.Tensor, bad: torch.Tensor
) -> None:
    """`accumulate` of one-dimensional tensors in plain torch."""
    blocks = zip(
        *(tensor.split(ROW_ELEMENTS) for tensor in (weight, gradient, scores)), strict=True
    )
    for w, g, score in blocks:
        if score.numel():
            score.add_(_products(w, g))
            bad.logical_or_(score.amax().isfinite().logical_not_())  # amax hands a NaN on


def torch_accumulate_columns(
    weight: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor, bad: torch.Tensor
) -> None:
    """`accumulate_columns` in plain torch."""
    step = max(1, ROW_ELEMENTS // max(1, weight.shape[1]))
    for w, g in zip(weight.split(step), gradient.split(step), strict=True):
        added = _products(w, g).sum(0, dtype=torch.float64)
        sums.add_(added)
        bad.logical_or_(added.isfinite().all().logical_not_())


def _products(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """|w · g| in float32, in memory of its own."""
    return weight.to(torch.float32, copy=True).mul_(gradient).abs_()


def _require_same(weight: torch.Tensor, *others: torch.Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (weight, *others)]
    if len({*shapes}) > 1:
        raise ValueError(f"sensitivity: expected equal shapes, found {shapes}")
