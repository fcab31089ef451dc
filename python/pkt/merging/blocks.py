"""Blocks of a checkpoint's tensors and of their changes: what memory holds of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pkt import _core
from pkt.checkpoint import DTYPE_BYTES, Checkpoint, Piece
from pkt.merging.layout import Output

BLOCK_BYTES = 8 << 20  # of a block of Δ in float32, or of a copy
NUMPY: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.uint16, "BF16": np.uint16,
    "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}  # fmt: skip

_PAGE = 4096
_READ_THREADS = 2  # a block is one positional read


class Blocks:
    """Blocks of a checkpoint's tensors and of Δ, in buffers that the next block overwrites."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        files = [(str(path), size) for path, size in checkpoint.files]
        self._reader = _core.Reader(files, "buffered", _READ_THREADS)
        self._memory = _aligned(BLOCK_BYTES + _PAGE)
        self._delta = torch.empty(0)
        self._target = np.empty(0, dtype=np.uint8)

    @staticmethod
    def spans(output: Output) -> list[tuple[int, int]]:
        """Half-open ranges of elements, whole rows of changed matrices, of a block each."""
        count = output.source.elements
        if output.change is None:
            step = BLOCK_BYTES // max(DTYPE_BYTES.get(output.dtype, 8), 4)
        else:
            columns = output.source.shape[1]
            step = max(1, BLOCK_BYTES // (4 * columns)) * columns
        return [(begin, min(begin + step, count)) for begin in range(0, count, step)]

    def read(self, tensor: Piece, begin: int, end: int) -> NDArray[np.uint8]:
        """The bytes of elements ``begin`` to ``end`` of a tensor, valid until the next call."""
        item = _core.dtype_bytes(tensor.dtype)
        first, last = tensor.begin + begin * item, tensor.begin + end * item
        extent = (tensor.shard, first, last, item)
        layout = _core.layout([extent])
        if layout.bytes > len(self._memory):
            self._memory = _aligned(layout.bytes)
        self._reader.read(layout, self._memory[: layout.bytes])
        place = layout.places[0]
        return self._memory[place : place + last - first]

    def delta(self, output: Output, begin: int, end: int) -> torch.Tensor | None:
        """The rows of Δ that hold elements ``begin`` to ``end``, flat; valid until the next."""
        if output.change is None:
            return None
        if self._delta.numel() < end - begin:
            self._delta = torch.empty(end - begin)
        columns = output.source.shape[1]
        rows, found = slice(begin // columns, end // columns), self._delta[: end - begin]
        torch.mm(output.change.b[rows], output.change.a, out=found.view(-1, columns))
        return found

    def target(self, count: int, dtype: str) -> NDArray[Any]:
        """Room for ``count`` elements, valid until the next call."""
        size = count * DTYPE_BYTES[dtype]
        if len(self._target) < size:
            self._target = _aligned(size)
        return self._target[:size].view(NUMPY[dtype])


def _aligned(size: int) -> NDArray[np.uint8]:
    memory = np.empty(size + _PAGE, dtype=np.uint8)
    return memory[-memory.ctypes.data % _PAGE :][:size]
