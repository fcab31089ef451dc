"""Several processes that train together, as accelerate joined them; one alone needs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import distributed

Item = TypeVar("Item")


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return not _joined() or distributed.get_rank() == 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _joined():
        distributed.barrier()


def any_process(wish: bool, device: torch.device) -> bool:
    """Whether any process wishes it: all must save and stop at the same step."""
    return sum_over_processes([float(wish)], device)[0] > 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This process's part: every n-th of ``items``."""
    if not _joined():
        return items
    return items[distributed.get_rank() :: distributed.get_world_size()]


def sum_over_processes(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sums in float64, the same in every process."""
    if not _joined():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    return [float(number) for number in total]


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()
