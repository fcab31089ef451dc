"""bfloat16 products made in float32: the exact product, rounded once, whoever asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from pkt import products
from pkt.host import multiplies_bfloat16
from pkt.products import Widened, bfloat16_products, multiplied_in

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def require_rounded_once(found: torch.Tensor, exact: torch.Tensor, terms: int) -> None:
    """Half a unit of bfloat16, and what float32 sums of ``terms`` products may be off by."""
    assert found.dtype == torch.bfloat16
    assert found.shape == exact.shape
    off = (found.double() - exact).abs()
    scale = 1.0 + (float(exact.abs().max()) if exact.numel() else 0.0)
    bound = 2.0**-8 * exact.abs() + terms * 2.0**-23 * scale
    assert bool((off <= bound).all())


sizes = st.integers(0, 9)


@settings(deadline=None)
@given(rows=sizes, inner=sizes, columns=sizes, turned=st.tuples(st.booleans(), st.booleans()),
       block=st.integers(1, 30), at_once=st.integers(1, 4))  # fmt: skip
def test_a_product_in_blocks_is_the_exact_one_rounded_once(
    rows: int, inner: int, columns: int, turned: tuple[bool, bool], block: int, at_once: int
) -> None:
    a = drawn(inner, rows).t() if turned[0] else drawn(rows, inner)
    b = drawn(columns, inner, seed=1).t() if turned[1] else drawn(inner, columns, seed=1)
    bias = drawn(columns, seed=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "WIDENED_ELEMENTS", block)
        patch.setattr(products, "WIDENED_ROWS", at_once)
        with Widened():
            found, shifted = a @ b, torch.addmm(bias, a, b, beta=0.5, alpha=2.0)
    exact = a.double() @ b.double()
    require_rounded_once(found, exact, inner)
    assert found.is_contiguous()
    require_rounded_once(shifted, 0.5 * bias.double() + 2 * exact, inner + 2)


BATCHED: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "bmm": lambda a, b, c: torch.bmm(a, b),
    "matmul": lambda a, b, c: a @ b,
    "linear": lambda a, b, c: functional.linear(a, b[0].T, c[0, 0]),
    "mv": lambda a, b, c: torch.mv(a[0], b[0, :, 0]),
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", BATCHED)
def test_every_kind_of_product_is_rounded_once(name: str, inference: bool) -> None:
    given = drawn(3, 4, 6), drawn(3, 6, 5, seed=1), drawn(3, 4, 5, seed=2)
    with torch.inference_mode(inference), Widened():
        found = BATCHED[name](*given)
    require_rounded_once(found, BATCHED[name](*(each.double() for each in given)), 8)


@pytest.mark.parametrize("mask", [False, True])
def test_attention_and_its_gradients_are_near_the_exact_ones(mask: bool) -> None:
    q, k, v = (drawn(2, 3, 40, 16, seed=n).requires_grad_() for n in range(3))
    dy = drawn(2, 3, 40, 16, seed=3)
    added = drawn(1, 1, 40, 40, seed=4) if mask else None

    def run(*args: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        out = functional.scaled_dot_product_attention(*args, attn_mask=bias, is_causal=not mask)
        return out, *torch.autograd.grad(out, args, dy.to(out.dtype))

    with Widened():
        found = run(q, k, v, bias=added)
    exact = run(q.double(), k.double(), v.double(), bias=None if added is None else added.double())
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2.0**-7, atol=2.0**-7)


def test_gradients_of_a_layer_are_made_in_float32_too() -> None:
    layer = torch.nn.Linear(48, 24).bfloat16()
    x = drawn(2, 7, 48).requires_grad_()
    with Widened():
        layer(x).sum().backward()
    weight = layer.weight.detach().double()
    assert x.grad is not None
    assert layer.weight.grad is not None
    require_rounded_once(x.grad, weight.sum(0).expand(2, 7, -1), 24)
    wanted = x.detach().double().flatten(0, 1).sum(0).expand(24, -1)
    require_rounded_once(layer.weight.grad, wanted, 14)


def test_other_types_are_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(5, 6).to(dtype), torch.randn(6, 7).to(dtype)
        with Widened():
            assert torch.equal(a @ b, _outside(a, b))


def _outside(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        return a @ b


def test_the_processor_decides() -> None:
    assert multiplies_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert multiplied_in(torch.float32, CPU) == torch.float32
    assert multiplied_in(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    widened = isinstance(bfloat16_products(CPU, torch.float32, torch.bfloat16), Widened)
    assert widened == (not multiplies_bfloat16())
    assert not isinstance(bfloat16_products(CPU, torch.float32), Widened)
