"""Cutting equals indexing the whole matrix, and reads no stored row twice."""

from __future__ import annotations

import random

import pytest
import torch

from pkt import cutting
from pkt.checkpoint import Piece
from pkt.cutting import cut_weights, cut_window, stack_parts
from pkt.records import Window

SHAPE = (12, 7)
MATRIX = torch.arange(84.0).view(SHAPE)
PIECE = Piece("w", 0, "F32", SHAPE, 0, 84 * 4)


class Reader:
    """Stands for the file; notes which entries were read."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.elements = self.largest = 0

    def __call__(self, piece: Piece, rows: range, cols: range) -> torch.Tensor:
        assert piece is PIECE
        self.rows += rows
        self.elements += len(rows) * len(cols)
        self.largest = max(self.largest, len(rows) * len(cols))
        return MATRIX[rows.start : rows.stop, cols.start : cols.stop].clone()


ROW_MAPS = {
    "none": None,
    "part": list(range(4, 10)),
    "repeated": [0, 1, 0, 1, 2, 3, 2, 3],
    "interleaved": [1, 2, 7, 8],
    "backwards": list(range(11, -1, -1)),
}


def logical(rows: list[int] | None) -> torch.Tensor:
    return MATRIX if rows is None else MATRIX[rows]


@pytest.mark.parametrize("name", ROW_MAPS)
def test_windows_equal_slices(name: str) -> None:
    rows = ROW_MAPS[name]
    whole = logical(rows)
    for top in range(len(whole) - 2):
        read = Reader()
        cut = cut_window(read, PIECE, Window("t", 0.0, (top, top + 3), (2, 6)), rows)
        assert torch.equal(cut, whole[top : top + 3, 2:6])
        assert len(read.rows) == len(set(read.rows)) <= 3
        assert read.elements == len(read.rows) * 4, "only the bytes of the window"


@pytest.mark.parametrize("block", [1, 14, 1 << 20])
@pytest.mark.parametrize("name", ROW_MAPS)
def test_crossed_rows_and_columns_equal_indexing(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole rows of a span are never held beyond a block: a run of rows is read in parts."""
    monkeypatch.setattr(cutting, "BLOCK_ELEMENTS", block)
    rows = ROW_MAPS[name]
    whole, draw = logical(rows), random.Random(0)
    for _ in range(20):
        chosen = (
            tuple(sorted(draw.sample(range(len(whole)), 3))),
            tuple(sorted(draw.sample(range(7), 4))),
        )
        read = Reader()
        cut = cut_window(read, PIECE, Window("t", 0.0, *chosen, crossed=True), rows)
        assert torch.equal(cut, whole[list(chosen[0])][:, list(chosen[1])])
        assert len(read.rows) == len(set(read.rows)) <= 3
        assert read.largest <= max(block, 7)


def test_chosen_columns_of_a_range_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "BLOCK_ELEMENTS", 21)
    window = Window("t", 0.0, (2, 11), (1, 3, 4), crossed=True, every_row=True)
    read = Reader()
    assert torch.equal(cut_window(read, PIECE, window, None), MATRIX[2:11][:, [1, 3, 4]])
    assert read.rows == list(range(2, 11))
    assert read.largest == 5 * 4


@pytest.mark.parametrize("block", [1, 8 * 7, 1 << 20])
@pytest.mark.parametrize("name", ROW_MAPS)
def test_single_weights_equal_flat_indexing(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the matrix is gathered in several blocks."""
    monkeypatch.setattr(cutting, "BLOCK_ELEMENTS", block)
    rows = ROW_MAPS[name]
    whole = logical(rows)
    flat = sorted(random.Random(1).sample(range(whole.numel()), 12))

    def indices(start: int, stop: int) -> torch.Tensor:
        assert start % 8 == 0
        return torch.tensor([i - start for i in flat if start <= i < stop], dtype=torch.long)

    cut = cut_weights(Reader(), PIECE, indices, rows, (3, 4))
    assert torch.equal(cut, whole.reshape(-1)[flat].view(3, 4))


def test_parts_are_put_where_the_student_stores_them() -> None:
    parts: list[tuple[torch.Tensor, list[int] | None]] = [
        (torch.full((2, 3), value), rows)
        for value, rows in ((1.0, [0, 3]), (2.0, [1, 4]), (3.0, [2, 5]))
    ]
    assert stack_parts(parts, 6)[:, 0].tolist() == [1, 2, 3, 1, 2, 3]
    assert stack_parts(parts[:1], 6)[:, 0].tolist() == [1, 0, 0, 1, 0, 0], "no other target"
    alone = torch.rand(4, 3)
    assert torch.equal(stack_parts([(alone, None)], 4), alone)


def test_element_types_are_kept() -> None:

    def read(piece: Piece, rows: range, cols: range) -> torch.Tensor:
        return MATRIX[rows.start : rows.stop, cols.start : cols.stop].to(torch.bfloat16)

    cut = cut_window(read, PIECE, Window("t", 0.0, (1, 3), (0, 7)), [3, 3, 5, 5])
    assert cut.dtype == torch.bfloat16
