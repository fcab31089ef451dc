"""Law 2: every selection equals brute force, through the binding, on thousands of small matrices.

Scores of few significant bits make every sum exact, in integers here and in the core's fixed
point, so that equal sums tie and the written rule decides: smallest row, then smallest column.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pkt import _core
from pkt.selection import (
    Cut,
    choose,
    choose_columns,
    logical_matrix,
    mask_indices,
    mask_sha256,
    pick_layers,
)

Array = NDArray[Any]
UNIT = 2.0**-20  # of an integer score
KINDS = ["ties", "few bits", "sparse", "constant"]


def integers(draw: np.random.Generator, kind: str, shape: tuple[int, int]) -> Array:
    high = {"ties": 3, "few bits": 1 << 12, "sparse": 50, "constant": 1}[kind]
    found = draw.integers(0, high, shape, dtype=np.int64)
    if kind == "sparse":
        found *= draw.integers(0, 8, shape) == 0
    return found + 7 if kind == "constant" else found


def cases(count: int, seed: int) -> Any:
    """Stored integers, an optional row map with its share, and the logical matrix × share."""
    draw = np.random.default_rng(seed)
    for index in range(count):
        shape = (int(draw.integers(1, 9)), int(draw.integers(1, 9)))
        stored = integers(draw, KINDS[index % len(KINDS)], shape)
        rows, share = None, 1
        if index % 3 == 1:  # any rows in any order
            rows = draw.integers(0, shape[0], int(draw.integers(1, 13))).astype(np.uint32)
        elif index % 3 == 2:  # kv heads of one or two rows, each repeated share times
            share, block = int(draw.integers(1, 5)), 1 + int(shape[0] % 2 == 0)
            heads = np.arange(shape[0], dtype=np.uint32).reshape(-1, block)
            rows = heads.repeat(share, axis=0).reshape(-1)
        share = {3: 4}.get(share, share)  # powers of two keep score / share exact
        logical = stored if rows is None else stored[rows]
        scores = (stored * UNIT).astype(np.float32).reshape(-1)
        yield draw, _core.Matrix(scores, shape[1], rows, share), logical, UNIT / share


def loop_window(matrix: Array, height: int, width: int) -> tuple[int, int, int]:
    """Four loops."""
    best = (-1, 0, 0)
    for row in range(matrix.shape[0] - height + 1):
        for column in range(matrix.shape[1] - width + 1):
            total = 0
            for i in range(height):
                for j in range(width):
                    total += int(matrix[row + i, column + j])
            if total > best[0]:
                best = (total, row, column)
    return best[1], best[2], best[0]


def table_window(matrix: Array, height: int, width: int) -> tuple[int, int, int]:
    """A summed-area table in int64; argmax takes the first, row by row."""
    table = np.zeros((matrix.shape[0] + 1, matrix.shape[1] + 1), dtype=np.int64)
    table[1:, 1:] = matrix.cumsum(0).cumsum(1)
    sums = table[height:, width:] - table[:-height, width:] - table[height:, :-width]
    sums = sums + table[:-height, :-width]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return row, column, int(sums[row, column])


def size_of(draw: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, int]:
    return int(draw.integers(1, shape[0] + 1)), int(draw.integers(1, shape[1] + 1))


def highest(sums: Array, k: int) -> list[int]:
    return sorted(sorted(range(len(sums)), key=lambda i: (-int(sums[i]), i))[:k])


def test_window_equals_four_loops_for_every_size() -> None:
    for draw, matrix, logical, unit in cases(60, seed=1):
        sizes = itertools.product(*(range(1, size + 1) for size in logical.shape))
        for height, width in list(sizes)[:: int(draw.integers(1, 5))]:
            row, column, total = loop_window(logical, height, width)
            assert (row, column, total) == table_window(logical, height, width)
            assert matrix.best_window(height, width) == (row, column, total * unit)


def test_window_equals_a_summed_area_table_on_thousands() -> None:
    tied = 0
    for draw, matrix, logical, unit in cases(6000, seed=2):
        height, width = size_of(draw, logical.shape)
        row, column, total = table_window(logical, height, width)
        assert matrix.best_window(height, width) == (row, column, total * unit)
        spans = (row, row + height), (column, column + width)
        assert matrix.window_score(*spans) == total * unit
        last = table_window(logical[::-1, ::-1], height, width)  # the last of equal ones
        mirrored = logical.shape[0] - height - last[0], logical.shape[1] - width - last[1]
        tied += mirrored != (row, column)
    assert tied > 1000, "ties must be common for this to be a test of the tie rule"


def test_rows_columns_and_weights_equal_sorting_on_thousands() -> None:
    for draw, matrix, logical, unit in cases(3000, seed=3):
        height, width = size_of(draw, logical.shape)
        rows, columns = matrix.top_rows(height), matrix.top_columns(width)
        assert rows == highest(logical.sum(1), height)
        assert columns == highest(logical.sum(0), width)
        assert matrix.cross_score(rows, columns) == logical[np.ix_(rows, columns)].sum() * unit
        count = int(draw.integers(1, logical.size + 1))
        mask = matrix.top_weights(count)
        chosen = highest(logical.reshape(-1), count)
        assert mask_indices(mask, 0, 8 * len(mask)).tolist() == chosen
        assert matrix.mask_score(mask) == logical.reshape(-1)[chosen].sum() * unit


def test_bins_are_means_of_their_entries() -> None:
    for draw, matrix, logical, unit in cases(300, seed=4):
        height, width = size_of(draw, logical.shape)
        means = np.asarray(matrix.bin_means(height, width)).reshape(height, width)
        for i, j in itertools.product(range(height), range(width)):
            tall = slice(i * logical.shape[0] // height, (i + 1) * logical.shape[0] // height)
            wide = slice(j * logical.shape[1] // width, (j + 1) * logical.shape[1] // width)
            assert means[i, j] == pytest.approx(logical[tall, wide].mean() * unit, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_arbitrary_floats_are_within_a_millionth_of_the_best(data: st.DataObject) -> None:
    """Any finite scores, of any magnitudes beside each other."""
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    value = st.floats(0, 2.0**100, width=32)
    values = data.draw(st.lists(value, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    height = data.draw(st.integers(1, shape[0]))
    width = data.draw(st.integers(1, shape[1]))
    scores = np.asarray(values, dtype=np.float32)
    matrix = _core.Matrix(scores, shape[1])
    row, column, score = matrix.best_window(height, width)
    exact = scores.astype(np.float64).reshape(shape)
    sums = {
        (r, c): exact[r : r + height, c : c + width].sum()
        for r in range(shape[0] - height + 1) for c in range(shape[1] - width + 1)
    }  # fmt: skip
    best, total = max(sums.values()), exact.sum()
    assert sums[row, column] >= best * (1 - 1e-6) - 2.0**-40 * total
    assert score == pytest.approx(sums[row, column], rel=1e-6, abs=2.0**-40 * total)


def test_repeated_heads_tie_and_the_first_copy_wins() -> None:
    """In floats they tie or not, as rounding will have it: a third, a fifth have no exact sums."""
    draw, copies = np.random.default_rng(5), 0
    for index in range(400):
        repeat = (3, 5, 6, 7)[index % 4]
        stored = draw.random((4, 10), dtype=np.float32)  # two heads of two rows
        rows = np.repeat(np.arange(4, dtype=np.uint32).reshape(2, 2), repeat, axis=0).reshape(-1)
        matrix = _core.Matrix(stored.reshape(-1), 10, rows, repeat)
        logical = stored[rows].astype(np.float64) / repeat
        row, column, score = matrix.best_window(2, 3)
        sums = [logical[r : r + 2, c : c + 3].sum() for r in range(len(rows) - 1) for c in range(8)]
        assert score == pytest.approx(max(sums), rel=1e-6)
        assert logical[row : row + 2, column : column + 3].sum() == pytest.approx(max(sums))
        same = [r for r in range(row + 1) if set(rows[r : r + 2]) == set(rows[row : row + 2])]
        assert row == same[0]
        copies += row in (0, 2 * repeat)
    assert copies > 200, "else the best window lies across two heads, and nothing ties"


def cut_of(shape: tuple[int, int], rows: Any = None, share: int = 1) -> Cut:
    return Cut("k", "m", "m", shape, rows, share)


@pytest.mark.parametrize("select", ["window", "orthogonal", "random-window", "rows-cols"])
def test_choose_records_places_and_their_sum(select: Any) -> None:
    draw = np.random.default_rng(6)
    scores = draw.random((9, 7), dtype=np.float32)
    rows = [8, 0, 1, 2, 5, 5, 5]
    cut = cut_of((3, 4), rows, 2)
    matrix = logical_matrix(scores, cut)
    window, mask = choose(matrix, cut, "model.layers.0.m", select, 0)
    assert choose(matrix, cut, "model.layers.0.m", select, 0) == (window, mask), "read before"
    assert mask is None
    assert window.rows is not None
    assert window.cols is not None
    logical = scores[rows].astype(np.float64) / 2
    at = np.ix_(window.row_indices, window.col_indices)
    assert window.score == pytest.approx(logical[at].sum(), rel=1e-9)
    assert logical[at].shape == (3, 4)
    assert (window.kv_repeat, window.teacher) == (2, "model.layers.0.m")
    if select in ("window", "orthogonal"):
        sums = [
            logical[r : r + 3, c : c + 4].sum() for r in range(5) for c in range(4)
        ]  # fmt: skip
        assert window.score == pytest.approx(max(sums), rel=1e-6)


def test_random_windows_reach_every_place_evenly() -> None:
    counts = np.zeros((3, 2))
    for seed in range(3000):
        row, column = _core.random_window((5, 4), (3, 3), seed)
        counts[row, column] += 1
        assert (row, column) == _core.random_window((5, 4), (3, 3), seed)
    assert counts.min() > 400
    assert counts.max() < 600


def test_random_weights_choose_exactly_and_evenly() -> None:
    counts = np.zeros(40)
    for seed in range(2000):
        mask = _core.random_weights(40, 7, seed)
        assert mask == _core.random_weights(40, 7, seed)
        found = mask_indices(mask, 0, 40)
        assert len(found) == 7
        counts[found] += 1
    assert counts.min() > 250  # 350 expected, standard deviation 17
    assert counts.max() < 450
    assert mask_indices(_core.random_weights(40, 40, 1), 0, 40).tolist() == list(range(40))
    assert not any(_core.random_weights(40, 0, 1))


def test_mask_hash_counts_flat_indices() -> None:
    import hashlib

    indices = [0, 7, 8, 9, 63, 64, 70]
    mask = bytearray(9)
    for index in indices:
        mask[index // 8] |= 1 << index % 8
    wanted = hashlib.sha256(b"".join(i.to_bytes(8, "little") for i in indices)).hexdigest()
    assert mask_sha256(bytes(mask)) == wanted
    assert mask_indices(bytes(mask), 8, 64).tolist() == [0, 1, 55]


def test_columns_equal_a_loop_on_hundreds() -> None:
    draw = np.random.default_rng(7)
    for index in range(500):
        high = 3 if index % 2 else 1 << 30
        sums = draw.integers(0, high, int(draw.integers(1, 30))).astype(np.float64)
        width = int(draw.integers(1, len(sums) + 1))
        totals = [sums[c : c + width].sum() for c in range(len(sums) - width + 1)]
        start = totals.index(max(totals))
        assert _core.best_columns(sums, width) == (start, totals[start])
        window = choose_columns(sums, width, 11, "embed_tokens")
        assert (window.rows, window.cols) == ((0, 11), (start, start + width))


def test_layers_are_the_highest_in_order_lowest_index_first() -> None:
    draw = np.random.default_rng(8)
    for _ in range(500):
        scores = draw.integers(0, 4, int(draw.integers(1, 12))).astype(float).tolist()
        count = int(draw.integers(1, len(scores) + 1))
        wanted = sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])
        assert pick_layers(scores, count, "sensitivity", 0) == wanted
        assert pick_layers(scores, count, "first", 0) == list(range(count))
        assert pick_layers(scores, count, "last", 0) == list(range(len(scores)))[-count:]
        chosen = pick_layers(scores, count, "random", 1)
        assert chosen == pick_layers(scores[::-1], count, "random", 1)  # scores do not matter
        assert chosen == sorted(set(chosen))
        assert len(chosen) == count
