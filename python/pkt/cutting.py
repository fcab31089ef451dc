"""Cutting the chosen part out of a teacher's matrix: only its bytes are read again.

A logical matrix may repeat or reorder stored rows (grouped-query heads, fused projections);
each stored row is read once. Parts of a fused student module are put back in the student's own
order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pkt.checkpoint import Piece
from pkt.records import Window

ReadWindow = Callable[[Piece, range, range], torch.Tensor]
Indices = Callable[[int, int], torch.Tensor]

BLOCK_ELEMENTS = 1 << 23  # a multiple of 8: single weights are gathered in blocks of this size


def cut_window(
    read: ReadWindow, piece: Piece, window: Window, rows: Sequence[int] | None
) -> torch.Tensor:
    """The weights of a contiguous window or of crossed rows and columns, (n_S, m_S).

    Args:
        read: reads rows × columns of a piece.
        piece: stored matrix.
        window: what was chosen, in logical indices.
        rows: stored row of each logical row; ``None`` where both are the same.

    """
    logical, chosen = window.row_indices, window.col_indices
    stored = list(logical) if rows is None else [rows[index] for index in logical]
    if not window.crossed:
        return _read_rows(read, piece, stored, window.col_range)
    at = torch.tensor(chosen) - chosen[0]
    return _read_rows(read, piece, stored, window.col_range, at)


def cut_weights(
    read: ReadWindow,
    piece: Piece,
    indices: Indices,
    rows: Sequence[int] | None,
    shape: tuple[int, int],
) -> torch.Tensor:
    """Single weights in row-major order of the logical matrix, reshaped to ``shape``.

    Args:
        read: reads rows × columns of a piece.
        piece: stored matrix.
        indices: gives the chosen flat indices between two bounds, less the first.
        rows: stored row of each logical row; ``None`` where both are the same.
        shape: (n_S, m_S) of the result.

    """
    columns = piece.shape[1]
    logical = list(range(piece.shape[0])) if rows is None else list(rows)
    step = max(8, BLOCK_ELEMENTS // columns // 8 * 8)
    found = []
    for start in range(0, len(logical), step):
        part = logical[start : start + step]
        block = _read_rows(read, piece, part, range(columns)).reshape(-1)
        found.append(block[indices(start * columns, (start + len(part)) * columns)])
    return torch.cat(found).view(shape)


def stack_parts(
    parts: Sequence[tuple[torch.Tensor, Sequence[int] | None]], height: int
) -> torch.Tensor:
    """One student matrix from its logical parts.

    Args:
        parts: weights and, for a part of a fused module, the row of each in the module.
        height: rows of the module; those of a part that is not a target stay zero.

    """
    if len(parts) == 1 and parts[0][1] is None:
        return parts[0][0]
    stacked = torch.zeros(height, parts[0][0].shape[1], dtype=parts[0][0].dtype)
    for weight, rows in parts:
        stacked[torch.tensor(rows)] = weight
    return stacked


def _read_rows(
    read: ReadWindow,
    piece: Piece,
    stored: Sequence[int],
    columns: range,
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """The stored rows in this order, each read once; of ``columns`` only those at ``at``."""
    distinct = sorted(set(stored))
    place = {row: index for index, row in enumerate(distinct)}
    longest = len(distinct) if at is None else max(1, BLOCK_ELEMENTS // len(columns))
    runs, start = [], 0
    for index in range(1, len(distinct) + 1):
        broken = index == len(distinct) or distinct[index] != distinct[index - 1] + 1
        if broken or index - start == longest:
            run = read(piece, range(distinct[start], distinct[index - 1] + 1), columns)
            runs.append(run if at is None else run[:, at])  # what lies between does not stay
            start = index
    block = runs[0] if len(runs) == 1 else torch.cat(runs)
    if list(stored) == distinct:
        return block
    return block[torch.tensor([place[row] for row in stored])]
