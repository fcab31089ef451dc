"""|w · g| added to scores on a CUDA device, in one pass: Triton kernels, and how to launch them.

A score is one float32 product and one float32 addition, the same bits as those of the Rust kernel:
weights and gradients widen to float32 exactly, and nothing is contracted to a fused
multiply-add. Sums over rows are float64. bfloat16 moves 12 bytes an element (2 + 2 + 4 read, 4
written), which is what bounds it. Launching does not wait for the device: that something was not
finite is left in its memory.

Checked by Triton's interpreter on the CPU and by compiling for a device; never yet run on one.
"""

from __future__ import annotations

import torch
import triton
from triton import language as tl

BLOCK = 2048  # elements of a program: 16 for each thread of 4 warps
TILE_ROWS, TILE_COLUMNS = 16, 128  # of a matrix, summed at once by a program of the column sums
MOST_CHUNKS = 256  # of rows, each with column sums of its own


def accumulate(
    weight: torch.Tensor, gradient: torch.Tensor, scores: torch.Tensor, bad: torch.Tensor
) -> None:
    """Add ``|weight · gradient|`` to ``scores``; set ``bad`` where a score is not finite then.

    Args:
        weight: bfloat16, float16 or float32, contiguous.
        gradient: as many elements, one of the same types, contiguous.
        scores: float32, as many, contiguous; changed in place.
        bad: int32, one element; set to 1 or left alone.

    """
    count = scores.numel()
    if count == 0:
        return
    with torch.cuda.device_of(scores):
        _accumulate[(triton.cdiv(count, BLOCK),)](
            weight, gradient, scores, bad, count, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )


def accumulate_columns(
    weight: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor, bad: torch.Tensor
) -> None:
    """Add the column sums of ``|weight · gradient|`` to ``sums``; set ``bad`` as `accumulate`.

    Every run adds in the same order, whatever the device: by rows of a chunk, then by chunks.

    Args:
        weight: (rows, D), as in `accumulate`.
        gradient: (rows, D).
        sums: (D,) float64; changed in place.
        bad: int32, one element; set to 1 if a product is not finite.

    """
    rows, columns = weight.shape
    if rows * columns == 0:
        return
    tiles = triton.cdiv(rows, TILE_ROWS)
    each = triton.cdiv(tiles, MOST_CHUNKS)  # tiles of a chunk
    chunks = triton.cdiv(tiles, each)
    partial = torch.empty(chunks, columns, dtype=torch.float64, device=sums.device)
    with torch.cuda.device_of(sums):
        _accumulate_columns[(triton.cdiv(columns, TILE_COLUMNS), chunks)](
            weight, gradient, partial, bad, rows, columns, each,
            TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    sums += partial.sum(0)


@triton.jit
def _accumulate(weights, gradients, scores, bad, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    weight = tl.load(weights + at, mask=there, other=0.0).to(tl.float32)
    gradient = tl.load(gradients + at, mask=there, other=0.0).to(tl.float32)
    score = tl.load(scores + at, mask=there, other=0.0) + tl.abs(weight * gradient)
    tl.store(scores + at, score, mask=there)
    finite = score < float("inf")  # a NaN is below nothing
    tl.store(bad, 1, mask=tl.min(finite.to(tl.int32), 0) == 0)


@triton.jit
def _accumulate_columns(
    weights, gradients, partial, bad, rows, columns, tiles,
    TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(1)
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    total = tl.zeros([TILE_COLUMNS], tl.float64)
    finite = tl.full([TILE_COLUMNS], 1, tl.int32)
    for tile in range(tiles):
        row = (chunk * tiles + tile).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
        at = row[:, None] * columns + column[None, :]
        there = (row[:, None] < rows) & (column[None, :] < columns)
        weight = tl.load(weights + at, mask=there, other=0.0).to(tl.float32)
        gradient = tl.load(gradients + at, mask=there, other=0.0).to(tl.float32)
        product = tl.abs(weight * gradient)
        finite = tl.minimum(finite, tl.min((product < float("inf")).to(tl.int32), 0))
        total += tl.sum(product.to(tl.float64), 0)
    to = chunk.to(tl.int64) * columns + column
    tl.store(partial + to, total, mask=column < columns)
    tl.store(bad, 1, mask=tl.min(finite, 0) == 0)
