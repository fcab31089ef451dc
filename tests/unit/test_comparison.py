"""Rates, intervals and rows of a comparison, on numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkt.compare.arms import ARMS, VARIATIONS, chosen, varied
from pkt.compare.cells import Cell
from pkt.compare.results import ArmResult, results, table
from pkt.compare.search import HIGHEST, LOWEST, best_rate, chosen_rate, neighbour
from pkt.compare.statistics import paired_difference
from pkt.errors import UsageError
from pkt.records import Sample, SampleSet


@given(st.floats(-4.5, -1.5), st.lists(st.floats(1e-5, 1e-1), min_size=1, max_size=3))
def test_the_best_rate_is_never_at_an_edge(optimum, grid):
    found = best_rate(lambda rate: (math.log10(rate) - optimum) ** 2, grid)
    best, tried = chosen_rate(found), sorted(found)
    assert tried[0] < best < tried[-1]
    assert abs(math.log10(best) - optimum) <= 0.75 or set(tried) >= set(grid)


def test_the_grid_stops_at_its_limits():
    downhill = best_rate(lambda rate: rate, (1e-3,))
    assert min(downhill) == pytest.approx(LOWEST)
    uphill = best_rate(lambda rate: -rate, (1e-1,))
    assert max(uphill) == pytest.approx(HIGHEST)


def test_where_every_rate_does_harm_smaller_ones_are_tried():
    def two_valleys(rate: float) -> float:
        near_nothing, harmful = (abs(math.log10(rate) + at) for at in (5, 2))
        return min(4.0 + near_nothing, 5.0 + harmful)

    assert chosen_rate(best_rate(two_valleys, (3e-3, 1e-2))) == 1e-2
    found = best_rate(two_valleys, (3e-3, 1e-2), 4.2)
    assert chosen_rate(found) == pytest.approx(1e-5)
    assert min(found) == pytest.approx(3e-6)
    assert min(best_rate(lambda rate: 9.0 - rate, (1e-2,), 4.2)) == pytest.approx(LOWEST)


def test_divergence_is_the_worst_loss():
    found = best_rate(lambda rate: math.inf if rate > 1e-3 else 1 - rate, (3e-4, 1e-3, 3e-3))
    assert chosen_rate(found) == 1e-3
    assert all(math.isinf(best_rate(lambda rate: math.inf, (1e-3,))[rate]) for rate in (1e-3,))


@pytest.mark.parametrize(
    ("rate", "above", "below"),
    [(1e-3, 3e-3, 3e-4), (3e-4, 1e-3, 1e-4), (2e-4, 3e-4, 1e-4), (5e-5, 1e-4, 3e-5)],
)
def test_neighbours_are_of_the_series(rate, above, below):
    assert neighbour(rate, 1) == above
    assert neighbour(rate, -1) == below


def test_paired_differences_see_what_unpaired_ones_would_not():
    generator = np.random.default_rng(0)
    hard = generator.normal(100, 30, 200)  # examples differ far more than the arms do
    tokens = np.full(200, 50.0)
    one = np.stack([hard + generator.normal(0, 1, 200) for _ in range(3)])
    other = one + generator.normal(0.5, 1, (3, 200))
    found = paired_difference(one, other, tokens)
    assert found.mean == pytest.approx(float((one - other).mean() / 50))
    assert found.low < found.mean < found.high < 0
    assert found.p < 0.05
    turned = paired_difference(other, one, tokens)
    assert turned.mean == -found.mean
    assert turned.p < 0.05


def test_no_difference_is_found_where_there_is_none():
    generator = np.random.default_rng(1)
    rejected = 0
    for _ in range(40):
        one, other = generator.normal(0, 1, (2, 3, 60))
        rejected += paired_difference(one, other, np.full(60, 10.0)).p < 0.05
    assert rejected <= 8


def test_seeds_that_differ_more_than_examples_are_no_evidence():
    generator = np.random.default_rng(2)
    rejected = 0
    for _ in range(60):
        seeds = generator.normal(0, 1, (2, 3, 1))
        one, other = seeds + generator.normal(0, 0.1, (2, 3, 40))
        rejected += paired_difference(one, other, np.full(40, 10.0)).p < 0.05
    assert rejected <= 8  # 3 are expected; resampling the three seeds rejects about 14


def test_equal_arms_have_p_one():
    same = np.ones((2, 10))
    found = paired_difference(same, same, np.full(10, 5.0))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def sample_set(count: int, tokens: int) -> SampleSet:
    sample = Sample("s", tuple(range(tokens + 1)), (False, *[True] * tokens))
    return SampleSet((sample,) * count, "", "none")


def arm_result(name: str, rate: float, each: list[float], tokens: int = 10) -> ArmResult:
    cells = [
        Cell(name, rate, repeat, value, (value * tokens,) * 4, 7, 1.0)
        for repeat, value in enumerate(each)
    ]
    return ArmResult(ARMS[name], {rate: each[0], rate * 3: math.inf}, cells)


def test_results_put_every_arm_against_the_best_that_saw_no_teacher():
    arms = [
        arm_result("lora", 1e-3, [2.0, 2.2]),
        arm_result("pissa", 1e-3, [2.5, 2.5]),
        arm_result("seeking", 1e-4, [1.5, 1.7]),
        arm_result("consistent", 1e-4, [math.inf, math.inf]),
    ]
    lines = {"student": [30.0] * 4, "teacher": [10.0] * 4}
    found = results(arms, lines, sample_set(3, 10), sample_set(4, 10))
    assert found["reference"] == "lora"
    rows = {row["arm"]: row for row in found["arms"]}
    assert rows["seeking"]["test"] == pytest.approx(1.6)
    assert rows["seeking"]["difference"] == pytest.approx(-0.5)
    assert rows["seeking"]["gap_closed"] == pytest.approx(0.7)
    assert rows["seeking"]["interval"] == pytest.approx([-0.5, -0.5])
    assert rows["consistent"]["test"] is None
    assert "difference" not in rows["lora"]
    lines_of_table = table(found).splitlines()
    assert len({len(line) for line in lines_of_table}) == 1
    assert "diverged" in table(found)
    unknown = results(arms, {"student": [30.0] * 4, "teacher": None}, sample_set(3, 10),
                      sample_set(4, 10))  # fmt: skip
    assert "gap_closed" not in unknown["arms"][0]
    assert "teacher" not in table(unknown)


def test_arms_come_in_the_tables_order_and_unknown_ones_are_named():
    assert [arm.name for arm in chosen(["seeking", "lora"])] == ["lora", "seeking"]
    with pytest.raises(UsageError, match="no arm 'nonsense'"):
        chosen(["nonsense"])


def test_variations_change_what_they_say():
    for kind, variation in VARIATIONS.items():
        of_alignment = kind in ("map", "interface", "output-loss", "kl-weight")
        arms = varied(ARMS["semalign-v1" if of_alignment else "seeking"], kind, None)
        assert len(arms) == len(variation.values)
        assert len({str(arm.options()) for arm in arms}) == len(arms), kind
    ranks = varied(ARMS["lora"], "rank", ["2", "8"])
    assert [arm.train["rank"] for arm in ranks] == [2, 8]
    assert [arm.extract for arm in ranks] == [None, None]
    with pytest.raises(UsageError, match="extracts nothing"):
        varied(ARMS["lora"], "split", None)
    with pytest.raises(UsageError, match="learns from no activations"):
        varied(ARMS["kd"], "map", None)
    with pytest.raises(UsageError, match="begins at zero"):
        varied(ARMS["lora"], "scale", None)
    (halved,) = varied(ARMS["gaussian"], "scale", ["0.50"])
    assert halved.train == {"init": "gaussian", "start": "scaled:0.5"}
    with pytest.raises(UsageError, match="--vary rank"):
        varied(ARMS["lora"], "rank", ["many"])
