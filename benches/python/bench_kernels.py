"""Scoring and window search beside torch, in one process and on the same tensors.

Bytes counted are those that move: a copy reads and writes each byte, scoring reads w and g (2 + 2)
and reads and writes the score (4 + 4). Each figure is the best of its repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from pkt import _core
from pkt.products import bfloat16_products, multiply
from pkt.sensitivity import accumulate, accumulate_products
from pkt.thin import Operand
from record import machine, write_record

CHUNK = 1 << 20


def best(work: Callable[[], object], repeat: int = 7) -> float:
    work()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def scoring() -> list[str]:
    shape = (4096, 11008)
    weight = torch.randn(shape).bfloat16()
    gradient = torch.randn(shape).bfloat16()
    scores = torch.zeros(shape)
    count = weight.numel()
    source, target = torch.ones(3 * count // 2), torch.zeros(3 * count // 2)

    def plain() -> None:
        scores.add_((weight.float() * gradient.float()).abs())

    def chunked() -> None:
        flat = weight.view(-1), gradient.view(-1), scores.view(-1)
        for at in range(0, count, CHUNK):
            w, g, s = (t[at : at + CHUNK] for t in flat)
            s.add_((w.float() * g.float()).abs_())

    copy = best(lambda: target.copy_(source))
    fused = best(lambda: accumulate(weight, gradient, scores))
    theirs = best(plain, 3)
    chunks = best(chunked)
    rate = 12 * count / fused / 1e9
    bandwidth = 12 * count / copy / 1e9
    return [
        f"scoring, bf16 {shape[0]}×{shape[1]}: fused {fused * 1e3:.1f} ms = "
        f"{count / fused / 1e9:.2f} G weights/s = {rate:.1f} GB/s",
        f"  copy of as many bytes {copy * 1e3:.1f} ms = {bandwidth:.1f} GB/s: "
        f"fused moves {rate / bandwidth:.2f} of that",
        f"  plain torch {theirs * 1e3:.1f} ms: {theirs / fused:.1f}× fused;   "
        f"torch by chunks of 1 M {chunks * 1e3:.1f} ms: {chunks / fused:.2f}× fused",
    ]


def gradients() -> list[str]:
    """Scores of a layer's weight from X and dY of four samples, beside gradients in memory."""
    size, tokens, count = 8192, 128, 4
    weight, scores = torch.randn(size, size).bfloat16(), torch.zeros(size, size)
    xs, dys = ([torch.randn(tokens, size).bfloat16() for _ in range(count)] for _ in range(2))

    def in_memory() -> None:
        with bfloat16_products(weight.device, weight.dtype):
            for x, dy in zip(xs, dys, strict=True):
                accumulate(weight, dy.T @ x, scores)

    ours = best(lambda: accumulate_products(weight, xs, dys, scores), 3)
    theirs = best(in_memory, 3)
    rate = 2 * tokens * count * size**2 / ours / 1e12
    return [
        f"scores of {size}², {count} × {tokens} tokens, from X and dY: {ours * 1e3:.0f} ms = "
        f"{rate:.3f} TFLOP/s; gradients in memory, then scored {theirs * 1e3:.0f} ms: "
        f"{theirs / ours:.2f}× ours"
    ]


def few_rows() -> list[str]:
    """Rows by a window from either side, as factors need them, beside oneDNN and BLAS."""
    shape, rows = (4096, 11008), 24
    weight = (torch.randn(shape) / 50).bfloat16()
    single, operand = weight.float(), Operand(weight)
    lines = []
    for name, depth, ours, matrix in (
        ("W", shape[0], operand.times, single),
        ("Wᵀ", shape[1], operand.times_transpose, single.T),
    ):
        x = torch.randn(rows, depth)
        seconds = best(partial(ours, x))
        onednn = best(partial(multiply, x, matrix))
        blas = best(partial(torch.matmul, x, matrix))
        rate = 2 * rows * weight.numel() / seconds / 1e12
        lines.append(
            f"{rows} rows · {name}, {shape[0]}×{shape[1]} bf16, laid out once: "
            f"{seconds * 1e3:.1f} ms = {rate:.3f} TFLOP/s; W in float32 by oneDNN "
            f"{onednn * 1e3:.1f} ms, by torch's BLAS {blas * 1e3:.1f} ms: "
            f"{onednn / seconds:.2f} and {blas / seconds:.2f}× ours"
        )
    laid = best(lambda: Operand(weight), 3)
    return [*lines, f"  laying W out for both: {laid * 1e3:.0f} ms"]


def window() -> list[str]:
    size, part = 8192, 4096
    scores = torch.rand(size, size)

    def table() -> tuple[int, int]:
        sums = torch.zeros(size + 1, size + 1, dtype=torch.float64)
        sums[1:, 1:] = scores.double().cumsum(0).cumsum(1)
        every = sums[part:, part:] - sums[:-part, part:] - sums[part:, :-part]
        every += sums[:-part, :-part]
        return divmod(int(every.argmax()), every.shape[1])

    flat = np.ascontiguousarray(scores.view(-1).numpy())

    def ours() -> tuple[int, int, float]:
        return _core.Matrix(flat, size).best_window(part, part)

    fast, slow = best(ours), best(table, 3)
    assert ours()[:2] == table(), "the two searches disagree"
    return [
        f"best {part}² window of {size}²: {fast * 1e3:.1f} ms; vectorised torch summed-area "
        f"table {slow * 1e3:.0f} ms: {slow / fast:.1f}× ours, same window"
    ]


if __name__ == "__main__":
    write_record("kernels", [machine(), *scoring(), *gradients(), *few_rows(), *window()])
