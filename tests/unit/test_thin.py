"""Products of a few rows with a large matrix, by the core and without it."""

from __future__ import annotations

import pytest
import torch

from pkt import thin
from pkt.thin import Operand


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("registers", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "n", "m"), [(1, 1, 1), (24, 300, 170), (7, 16, 33), (0, 5, 6)])
def test_products_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, registers: bool, dtype: torch.dtype, rows: int, n: int, m: int
) -> None:
    if registers and not thin.fuses_in_registers():
        pytest.skip("a processor without fused multiply-add in wide registers")
    monkeypatch.setattr(thin, "fuses_in_registers", lambda: registers)
    weight = gaussian(n, m).to(dtype)
    operand = Operand(weight)
    there, back = gaussian(rows, n, seed=1), gaussian(rows, m, seed=2)
    exact = weight.float().double()  # what float64 has beyond float32 is rounded off first
    for found, expected in (
        (operand.times(there), there.double() @ exact),
        (operand.times_transpose(back), back.double() @ exact.T),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_strides_and_offsets_leave_no_trace() -> None:
    whole = gaussian(40, 60).bfloat16()
    parts = (whole.T, whole[3:, 5:], whole[::2])
    rows = gaussian(80, 5, seed=3)
    for weight in parts:
        turned = rows[: weight.shape[0]].T  # not contiguous either
        found = Operand(weight).times(turned)
        same = Operand(weight.clone().contiguous()).times(turned.contiguous())
        assert torch.equal(found, same)
