"""What the processor gives: scoring beside copying, the window search, and matrix products.

Each figure is the best of its repetitions. Bytes counted are those that move: a copy reads and
writes each byte; scoring reads w and g and reads and writes the float32 score.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pkt.config import MIB, format_bytes
from pkt.errors import BudgetError
from pkt.host import memory_limit
from pkt.products import bfloat16_products
from pkt.records import Select
from pkt.selection import Cut, choose, logical_matrix
from pkt.sensitivity import LayerScores, accumulate

TOKENS = 128  # of the seed whose gradient is made
SCORE_SHAPE = (4096, 11008)
WINDOW_SHAPE = (8192, 8192)
SQUARE = 4096  # side of the matrices that are multiplied
LEAST_SECONDS = 0.2
COPIED = 512 * MIB  # moved to measure the bandwidth of memory; less for small matrices


@dataclass(frozen=True, slots=True)
class MatmulRate:
    """A product of square matrices."""

    dtype: str
    size: int
    teraflops: float  #: 2·size³ / seconds / 10¹²


@dataclass(frozen=True, slots=True)
class ScoreRates:
    """Scoring of a matrix of bfloat16 weights, one seed."""

    rows: int
    columns: int
    tokens: int
    copy_gigabytes_per_second: float
    fused_gigaparameters_per_second: float  #: |w·g| added to scores, g given
    fused_gigabytes_per_second: float
    made_gigaparameters_per_second: float  #: g = dYᵀX made, and scored
    made_teraflops: float  #: of that product, with the scoring in its time

    @property
    def share_of_copy(self) -> float:
        """Bytes a second of the fused scoring over those of a copy."""
        return self.fused_gigabytes_per_second / self.copy_gigabytes_per_second


@dataclass(frozen=True, slots=True)
class WindowRates:
    """The search for the best window, and the products that the rest of the time goes to."""

    rows: int
    columns: int
    window_rows: int
    window_columns: int
    seconds: float
    matmul: tuple[MatmulRate, ...]


def bench_score(shape: tuple[int, int] = SCORE_SHAPE, tokens: int = TOKENS) -> ScoreRates:
    """Score a matrix of ``shape`` for one seed of ``tokens`` tokens.

    Raises:
        BudgetError: this host has not the memory: two matrices in bfloat16, two in float32.

    """
    _require(12 * shape[0] * shape[1] + COPIED, shape)
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    scores, count = torch.zeros(shape), weight.numel()
    fused = best(lambda: accumulate(weight, gradient, scores))
    x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
    dy = torch.randn(tokens, shape[0], generator=generator).bfloat16()
    observer = LayerScores(scores.view(-1), lambda *_: None, lambda *_: {})
    made = best(lambda: observer.linear("matrix", weight, [x], [dy]))
    return ScoreRates(
        *shape,
        tokens,
        copy_gigabytes_per_second=copy_bandwidth(min(COPIED, 12 * count)),
        fused_gigaparameters_per_second=count / fused / 1e9,
        fused_gigabytes_per_second=12 * count / fused / 1e9,
        made_gigaparameters_per_second=count / made / 1e9,
        made_teraflops=2 * tokens * count / made / 1e12,
    )


def bench_window(
    shape: tuple[int, int] = WINDOW_SHAPE,
    window: tuple[int, int] | None = None,
    square: int = SQUARE,
) -> WindowRates:
    """Find the best ``window`` (by default half of either side) of a matrix of ``shape``.

    Raises:
        BudgetError: this host has not the memory: two matrices in float32.

    """
    _require(8 * shape[0] * shape[1], shape)
    generator = torch.Generator().manual_seed(0)
    scores = np.ascontiguousarray(torch.rand(shape, generator=generator).numpy())
    part = window or (max(1, shape[0] // 2), max(1, shape[1] // 2))
    cut = Cut("matrix", "matrix", "matrix", part, None, 1)
    select: Select = "window"
    seconds = best(lambda: choose(logical_matrix(scores, cut), cut, "matrix", select, 0))
    products = tuple(matmul(dtype, square) for dtype in (torch.bfloat16, torch.float32))
    return WindowRates(*shape, *part, seconds, products)


def matmul(dtype: torch.dtype, size: int = SQUARE) -> MatmulRate:
    """The rate of a product of square matrices of ``dtype``, made as a run makes it."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    with bfloat16_products(a.device, dtype):
        seconds = best(lambda: a @ b)
    return MatmulRate(str(dtype).removeprefix("torch."), size, 2 * size**3 / seconds / 1e12)


def copy_bandwidth(moved_bytes: int) -> float:
    """GB/s, read and written bytes both counted, of a copy that moves ``moved_bytes``."""
    source = torch.ones(max(1, moved_bytes // 8))
    target = torch.zeros_like(source)
    return 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9


def _require(needed: int, shape: tuple[int, int]) -> None:
    limit, source = memory_limit()
    if needed > limit:
        raise BudgetError(
            f"a matrix of {shape[0]} × {shape[1]} takes {format_bytes(needed)} to measure with; "
            f"{source} leaves {format_bytes(limit)}",
            "name a smaller --teacher, or none",
        )


def best(work: Callable[[], object], least_seconds: float = LEAST_SECONDS) -> float:
    """The shortest of at least two runs after a first one, repeated for a fifth of a second."""
    work()
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < least_seconds:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
