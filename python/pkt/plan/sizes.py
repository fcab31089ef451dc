"""Sizes that every plan counts: what the libraries, one product, one activation hold."""

from __future__ import annotations

import os
from collections.abc import Iterable

from pkt.checkpoint import DTYPE_BYTES
from pkt.config import MIB, WHOLE_BELOW, WHOLE_RANKS, WIDENED_ELEMENTS, WIDENED_ROWS
from pkt.host import multiplies_bfloat16, multiplies_in_registers
from pkt.models import Model
from pkt.records import PlanPart

BASE_BYTES = 576 * MIB  # the interpreter, torch, transformers and peft, measured
BLOCK_BYTES = 48 * MIB  # a row block of gradients, and what its product copies
PACKED_BYTES = 4 * MIB  # what gradients in registers are made of, a few threads
THREAD_BYTES = 640 << 10  # of those, each thread's
HEAP_BYTES = 32 * MIB  # blocks from here on are glibc's own mappings, smaller ones lie in its heap
FEW_BYTES = 8 * MIB  # of those in the heap, larger ones than this leave fewer gaps, measured
CALLS_BYTES = 64 * MIB  # masks and position embeddings, at most
DEVICE_BASE_BYTES = 256 * MIB  # of a device: work spaces, code, what fragments; estimated
DEVICE_BLOCK_BYTES = 128 * MIB  # a row block of gradients there, and the head's; estimated
PRODUCT_BYTES = 640 << 10  # what oneDNN keeps of a bfloat16 product of one shape, measured
MOST_PRODUCTS = 1024  # of which it keeps so many
EAGER = ("gemma2", "granite_swa", "vaultgemma")
SEED_BYTES = 48  # of a token, as Python holds it: measured
INDEX_BYTES = 144  # a chosen row or column: a Python integer, and what writes it as JSON


def total_bytes(parts: Iterable[PlanPart]) -> int:
    """Sum of the parts."""
    return sum(part.bytes for part in parts)


def is_eager(teacher: Model) -> bool:
    """Whether transformers runs its eager attention for this family (it has soft caps or sinks)."""
    return teacher.family in EAGER or bool(teacher.config.get("attn_logit_softcapping"))


def kept_bytes(tensor: int) -> int:
    """Of an activation of so many bytes and of the gradients beside it.

    The allocator gives the pages of large ones back at once; smaller ones leave gaps in its heap.
    """
    if tensor >= HEAP_BYTES:
        return tensor * 5 // 4
    return tensor * 3 // 2 if tensor >= FEW_BYTES else 2 * tensor


def factoring_bytes(rows: int, columns: int, rank: int, dtype: str) -> int:
    """What the leading factors of a window of so many rows and columns are made with.

    The window as stored, and the next one with what it is cut from; then either all of its triplets
    in float64, or the window laid out for products from either side and a Krylov basis with its
    image (`pkt.factorization`), whose size is what Gaussian windows of up to 4096 rows need.
    """
    elements, short = rows * columns, min(rows, columns)
    read = 3 * DTYPE_BYTES[dtype] * elements
    if short <= WHOLE_BELOW or WHOLE_RANKS * rank >= short:
        return read + 16 * elements + 8 * short * (rows + columns) + 40 * short * short
    laid_out = {"BF16": 4, "F32": 8}.get(dtype, 12) * elements
    basis = min(short, int((rank + 2) * (10 + 96 / (rank + 2) ** 0.5)))
    return read + laid_out + 10 * basis * (rows + columns) + 40 * basis * basis


def block_bytes(dtype: str) -> int:
    """What gradients of linear weights take on a CPU while they are scored."""
    if dtype == "BF16" and multiplies_in_registers():
        return max(PACKED_BYTES, THREAD_BYTES * len(os.sched_getaffinity(0)))
    return BLOCK_BYTES


def attention_bytes(teacher: Model, rows: int, longest: int, item: int) -> int:
    """What attention keeps of a batch of so many rows beyond q, k and v.

    Fused attention keeps a few rows of probabilities at a time. A model that caps them (Gemma 2) or
    adds sinks to them runs transformers' eager code, which keeps whole matrices: logits, capped,
    softmax in float32. So does torch's own, in float32, where values are of another width than
    queries (latent attention).
    """
    if is_eager(teacher):
        return rows * longest * teacher.heads * (4 * item + 8)
    config = teacher.config
    queries = sum(config.get(f"qk_{part}_head_dim") or 0 for part in ("nope", "rope"))
    queries = queries or teacher.head_dim
    if (config.get("v_head_dim") or queries) != queries:
        return rows * longest * teacher.heads * 12
    return 2 * min(longest, 512) * rows * teacher.heads * item


def widened(dtype: str, rows: int, widths: Iterable[int]) -> list[PlanPart]:
    """What products of bfloat16 hold where the processor makes them in float32 (`pkt.products`).

    A block of a weight, so many rows of what it is multiplied with, and of the result.
    """
    if dtype != "BF16" or multiplies_bfloat16():
        return []
    sides = [*widths]
    widest, rows = max(sides, default=0), min(rows, WIDENED_ROWS)
    result = min(widest, WIDENED_ELEMENTS // max(1, min(sides, default=1)))
    held = 4 * (WIDENED_ELEMENTS + rows * (widest + result))
    return [PlanPart("products in float32", held, "blocks of bfloat16 ones")]


def kept_products(dtype: str, shapes: int, kinds: int) -> list[PlanPart]:
    """What oneDNN keeps of products of bfloat16: of so many ``kinds`` for each shape of a batch."""
    if dtype != "BF16" or not multiplies_bfloat16():
        return []
    held = min(MOST_PRODUCTS, shapes * kinds) * PRODUCT_BYTES
    return [PlanPart("products of each shape", held, f"{shapes} shapes of a batch")]


def is_native(layer: object, dtype: str) -> bool:
    """Whether every large tensor can be used where it was read."""
    assert isinstance(layer, dict)
    dtypes = {p.dtype for p in layer.values() if len(p.shape) == 2 and p.dtype in DTYPE_BYTES}
    return dtypes <= ({"F16", "BF16"} if dtype == "BF16" else {dtype})
