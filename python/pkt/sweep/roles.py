"""What a sweep works with: where weights come from, and who sees the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from pkt.checkpoint import Piece

Weights = Mapping[str, torch.Tensor]
Notify = Callable[[str, int, int], None]


class Observer(Protocol):
    """What becomes of the gradients, those of each sample by themselves.

    Whether they are finite may be told by a bool tensor, which the device need not know yet.
    """

    def begin_layer(self, layer: int) -> None:
        """The layer's samples begin, perhaps anew: what was seen of a layer before is void."""

    def linear(
        self,
        module: str,
        weight: torch.Tensor,
        xs: Sequence[torch.Tensor],
        dys: Sequence[torch.Tensor],
    ) -> Sequence[bool | torch.Tensor]:
        """Inputs (n, in) and upstream gradients (n, out) of some seeds; whether each is finite."""

    def parameter(
        self, name: str, weight: torch.Tensor, gradient: torch.Tensor
    ) -> bool | torch.Tensor:
        """One seed's gradient of any other parameter; false if not finite."""

    def finish_matrix(self, layer: int, module: str, weight: torch.Tensor) -> None:
        """Every seed's part of this linear weight has been seen."""

    def finish_layer(self, layer: int) -> dict[str, Any]:
        """Every parameter of the layer is finished: its JSON record."""


class Source(Protocol):
    """Where weights come from: the stream of jobs, and reads out of turn."""

    def jobs(self, labels: Sequence[tuple[str, dict[str, Piece]]]) -> Iterator[Weights]:
        """The weights of each job in order, valid until the next is asked for."""

    def read(self, pieces: dict[str, Piece]) -> dict[str, torch.Tensor]:
        """Some tensors now, in memory of their own."""
