"""A few rows times a large matrix, again and again, as iterations on its triplets need it."""

from __future__ import annotations

import torch

from pkt import _core
from pkt.host import fuses_in_registers
from pkt.products import multiply


class Operand:
    """A matrix W (n, m) that is multiplied from the left by a few rows at a time.

    On a CPU with the registers for it W is laid out once for either side, in bfloat16 if it is
    stored so, and products are chains of fused multiply-adds in float32 (`pkt_core::thin`): 1.4 to
    2 times as fast as oneDNN's, which packs W for each. Elsewhere W is held in float32.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        """Lay out ``weight``, of any float type."""
        self.shape = (weight.shape[0], weight.shape[1])
        self._packed = self._single = None
        if weight.device.type == "cpu" and fuses_in_registers():
            half = weight.dtype == torch.bfloat16
            stored = weight.detach().contiguous() if half else weight.float().contiguous()
            memory = stored.view(torch.uint16) if half else stored
            dtype = "BF16" if half else "F32"
            self._packed = _core.Packed(memory.view(-1).numpy(), dtype, *self.shape)
        else:
            self._single = weight.float()

    def times(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (b, n) times W: (b, m) float32."""
        return self._product(rows, turned=False)

    def times_transpose(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (b, m) times Wᵀ: (b, n) float32."""
        return self._product(rows, turned=True)

    def _product(self, rows: torch.Tensor, *, turned: bool) -> torch.Tensor:
        if self._packed is None:
            assert self._single is not None
            return multiply(rows, self._single.T if turned else self._single)
        made = rows.new_empty(rows.shape[0], self.shape[0 if turned else 1])
        self._packed.multiply(rows.contiguous().view(-1).numpy(), made.view(-1).numpy(), turned)
        return made
