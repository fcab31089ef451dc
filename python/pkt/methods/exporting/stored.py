"""Base weights that PEFT saved along with an adapter: of no use here, if they are the base's own.

Whoever adapts the embedding or the head finds the whole of it in the adapter's file. If it was
trained or resized, the adapter is more than its factors.
"""

from __future__ import annotations

from typing import Any

import torch

from pkt.errors import IncompatibleError
from pkt.methods.exporting.task import Task

_ROWS = 4096
_TOLERANCE = 2.0**-7  # of a weight, for a copy in bfloat16


def require_own_base(task: Task) -> None:
    """Compare every saved base weight with the student's, less the start where there is one.

    Raises:
        IncompatibleError: one was trained or resized.

    """
    from safetensors import safe_open

    adapter = task.adapter
    if not adapter.stored:
        return
    with safe_open(adapter.folder / "adapter_model.safetensors", framework="pt") as saved:
        for module, key in adapter.stored.items():
            piece = task.architecture.piece(module)
            same = piece is not None
            if piece is not None:
                path = task.student.checkpoint.files[piece.shard][0]
                with safe_open(path, framework="pt") as source:
                    same = _same(saved.get_slice(key), source.get_slice(piece.name), task, module)
            if not same:
                raise IncompatibleError(
                    f"{adapter.folder}: tensor '{key}': expected the base's own weight, found one "
                    "that was trained or resized",
                    "a LoRA holds its factors alone: train without it, or merge with PEFT",
                )


def _same(saved: Any, source: Any, task: Task, module: str) -> bool:
    if saved.get_shape() != source.get_shape():
        return False
    start = task.start.factors.get(module) if task.start else None
    b: Any = start.b if start else None
    a: Any = start.a if start else None
    if start and task.places[module].transposed:
        b, a = start.a.T, start.b.T
    for begin in range(0, source.get_shape()[0], _ROWS):
        expected = source[begin : begin + _ROWS].float()
        if b is not None:
            expected = expected - b[begin : begin + _ROWS] @ a
        off = (saved[begin : begin + _ROWS].float() - expected).abs()
        room = _TOLERANCE * expected.abs() + 1e-5 * expected.abs().max()
        if not bool(torch.all(off <= room)):
            return False
    return True
