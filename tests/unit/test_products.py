"""Low-rank arithmetic by factors, against the dense matrices that it never makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkt.adapter import product_norm, recompress, side_by_side
from pkt.records import LowRank


def random(rows: int, columns: int, rank: int, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    b = torch.randn(rows, rank, generator=draw)
    return LowRank(b, torch.randn(rank, columns, generator=draw))


def dense(half: LowRank) -> torch.Tensor:
    return half.b.double() @ half.a.double()


sizes = st.integers(1, 12)


@settings(deadline=None)
@given(rows=sizes, columns=sizes, held=sizes, rank=sizes, seed=st.integers(0, 99))
def test_recompression_is_the_dense_singular_value_decomposition(
    rows: int, columns: int, held: int, rank: int, seed: int
) -> None:
    """Also where the factors have more rank than the matrix can."""
    half = random(rows, columns, held, seed)
    whole, made = dense(half), recompress(half, rank)
    sigma = torch.linalg.svdvals(whole)
    expected = float(sigma[rank:].norm()) if held > rank else 0.0
    norm = float(whole.norm())
    assert made.error == pytest.approx(expected, abs=1e-6 * norm)
    assert made.norm == pytest.approx(norm, rel=1e-6)
    assert float((dense(made.factors) - whole).norm()) == pytest.approx(expected, abs=1e-5 * norm)
    assert made.factors.a.shape[0] <= min(rank, held)
    assert made.factors.a.dtype == made.factors.b.dtype == torch.float32


def test_factors_that_are_small_enough_are_left_alone() -> None:
    half = random(7, 5, 3)
    made = recompress(half, 3)
    assert made.factors is half
    assert (made.error, made.relative) == (0.0, 0.0)


def test_nothing_has_no_relative_error() -> None:
    nothing = LowRank(torch.zeros(4, 3), torch.ones(3, 6))
    assert recompress(nothing, 1).relative == 0.0
    assert recompress(nothing, 1).factors.b.isfinite().all()


def test_both_halves_of_recompressed_factors_weigh_the_same() -> None:
    made = recompress(random(40, 30, 8), 4).factors
    torch.testing.assert_close(made.b.norm(dim=0), made.a.norm(dim=1))


def test_side_by_side_is_the_difference_over_the_union_of_modules() -> None:
    trained = {"both": random(6, 5, 2), "mine": random(4, 3, 2)}
    frozen = {"both": random(6, 5, 3, seed=1), "theirs": random(5, 5, 1)}
    joined = side_by_side(trained, frozen)
    assert {name: half.a.shape[0] for name, half in joined.items()} == {
        "both": 5, "mine": 2, "theirs": 1,
    }  # fmt: skip
    expected = dense(trained["both"]) - dense(frozen["both"])
    torch.testing.assert_close(dense(joined["both"]), expected)
    torch.testing.assert_close(dense(joined["mine"]), dense(trained["mine"]))
    torch.testing.assert_close(dense(joined["theirs"]), -dense(frozen["theirs"]))


def test_the_norm_of_a_product_without_the_product() -> None:
    half = random(9, 13, 4)
    assert product_norm(half) == pytest.approx(float(dense(half).norm()))
