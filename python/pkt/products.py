"""bfloat16 products on processors without instructions for them, at the rate of float32.

torch gives bfloat16 matrices to oneDNN where that has kernels for them (AVX-512 on x86). Elsewhere
it falls back to loops a hundred times slower than float32. Under `bfloat16_products` every such
product is made in float32 instead, forward and backward, whatever code asks for it: operands are
widened, which is exact, a block of a large matrix at a time, and the result is rounded once. That
is what oneDNN's kernels do inside, so a run means the same on either processor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pkt.config import WIDENED_ELEMENTS, WIDENED_ROWS
from pkt.host import multiplies_bfloat16

_aten = torch.ops.aten
_Attention = (
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


def multiplied_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type that products of ``dtype`` are made in: float32 where the processor has no other."""
    widened = dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()
    return torch.float32 if widened else dtype


def bfloat16_products(
    device: torch.device, *dtypes: torch.dtype
) -> contextlib.AbstractContextManager[object]:
    """A context in which models of ``dtypes`` multiply on ``device`` as fast as it can."""
    widened = any(multiplied_in(dtype, device) != dtype for dtype in dtypes)
    return Widened() if widened else contextlib.nullcontext()


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left · right`` of float32 matrices: on a CPU by oneDNN, which is faster than BLAS.

    By a quarter for hundreds of rows, twice for a few dozen; and a row has the same bits whatever
    rows there are beside it.
    """
    usable = left.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if not usable or not left.shape[1]:
        return left @ right
    made: torch.Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return made


class Widened(TorchDispatchMode):
    """Makes products of bfloat16 matrices on the CPU in float32, and rounds them once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rooms: dict[str, torch.Tensor] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for every operation."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is None or not args or not _is_ours(args[0]):
            return func(*args, **kwargs)
        return handler(self, func, *args, **kwargs)

    def _decomposed(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        with self:
            return func.decompose(*args, **kwargs)

    def _mm(self, func: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out = a.new_empty(a.shape[0], b.shape[1])
        for at, product in self._products(a, b):
            out[at] = product
        return out

    def _addmm(
        self, func: Any, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor,
        *, beta: float = 1, alpha: float = 1,
    ) -> torch.Tensor:  # fmt: skip
        out = a.new_empty(a.shape[0], b.shape[1])
        every = bias.expand_as(out)
        for at, product in self._products(a, b):
            product.mul_(alpha)
            out[at] = product.add_(every[at], alpha=beta) if beta else product
        return out

    def _small(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Operands of activations' size are widened whole."""
        return func(*_widened(args), **kwargs).to(args[0].dtype)

    def _attention(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Its log-sum-exp is float32 anyhow; every other result is in the type of the queries."""
        mask = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
                for k, v in kwargs.items()}  # fmt: skip
        first, *others = func(*_widened(args), **mask)
        if func is _Attention[0]:
            return first.to(args[0].dtype), *others
        return tuple(gradient.to(args[0].dtype) for gradient in (first, *others))

    def _products(
        self, a: torch.Tensor, b: torch.Tensor
    ) -> Iterator[tuple[tuple[slice, slice], torch.Tensor]]:
        """``ab`` in float32, block by block: where each belongs, and the block."""
        inner, width = b.shape
        step = max(1, WIDENED_ELEMENTS // max(1, inner))
        by_rows = b.stride(0) > b.stride(1)  # a row of b lies together, else a column
        for first in range(0, a.shape[0], WIDENED_ROWS):
            rows = slice(first, first + WIDENED_ROWS)
            left = self._room("left", a[rows].shape).copy_(a[rows])
            for start in range(0, width, step):
                columns = slice(start, min(start + step, width))
                shape = (inner, columns.stop - start)
                wide = self._room("block", shape if by_rows else shape[::-1])
                wide = (wide if by_rows else wide.t()).copy_(b[:, columns])
                yield (rows, columns), multiply(left, wide)

    def _room(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Float32 memory that is used again: to touch new memory takes longer than to fill it."""
        size = math.prod(shape)
        held = self._rooms.get(name)
        if held is None or held.numel() < size:
            held = self._rooms[name] = torch.empty(size)
        return held[:size].view(shape)


def _is_ours(first: Any) -> bool:
    return (
        isinstance(first, torch.Tensor)
        and first.dtype == torch.bfloat16
        and first.device.type == "cpu"
    )


def _widened(args: Sequence[Any]) -> list[Any]:
    return [a.float() if isinstance(a, torch.Tensor) and _is_ours(a) else a for a in args]


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: Widened._mm,
    _aten.addmm.default: Widened._addmm,
    _aten.bmm.default: Widened._small,
    _aten.baddbmm.default: Widened._small,
    _aten.mv.default: Widened._small,
    _aten.dot.default: Widened._small,
    _Attention[0]: Widened._attention,
    _Attention[1]: Widened._attention,
    # These come whole in inference mode, else as what they are made of.
    _aten.linear.default: Widened._decomposed,
    _aten.matmul.default: Widened._decomposed,
    _aten.scaled_dot_product_attention.default: Widened._decomposed,
}
