"""Where training begins: each start's own law."""

from __future__ import annotations

import math

import pytest
import torch

from pkt.methods.tuning.starts import (
    Form,
    gaussian,
    halves,
    leading,
    ordinary,
    principal,
    product_norm,
)
from pkt.records import LowRank

WEIGHTS = {"a": torch.randn(24, 16), "b": torch.randn(3, 40)}
RANK = 4


def test_an_ordinary_start_is_pefts_own_in_distribution():
    found = ordinary({"a": (64, 4096)}, 16, seed=0)
    assert found.frozen is None
    half = found.trained["a"]
    assert not half.b.any()
    bound = 1 / math.sqrt(4096)  # kaiming_uniform_(a=√5), as torch and PEFT draw it
    assert half.a.abs().max() <= bound
    assert half.a.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_principal_is_the_best_approximation():
    for name, half in principal(WEIGHTS, RANK).items():
        weight = WEIGHTS[name]
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        r = min(RANK, *weight.shape)
        best = (u[:, :r] * s[:r]) @ vt[:r]
        assert (half.b.double() @ half.a.double() - best).norm() <= 1e-4 * best.norm()
        torch.testing.assert_close(half.b.norm(dim=0), half.a.norm(dim=1))


@pytest.mark.parametrize("make", ["principal", "gaussian"])
def test_norms_are_those_asked_for(make):
    def wanted(name: str) -> float:
        return {"a": 3.0, "b": 0.5}[name]

    found = (
        principal(WEIGHTS, RANK, wanted)
        if make == "principal"
        else gaussian(WEIGHTS, RANK, 0, wanted)
    )
    for name, half in found.items():
        assert (half.b @ half.a).norm().item() == pytest.approx(wanted(name), rel=1e-5)
        assert product_norm(half) == pytest.approx(wanted(name), rel=1e-5)


def test_gaussian_without_norms_is_as_large_as_principal():
    ours, theirs = gaussian(WEIGHTS, RANK, 0), principal(WEIGHTS, RANK)
    for name in WEIGHTS:
        assert product_norm(ours[name]) == pytest.approx(product_norm(theirs[name]), rel=1e-3)
        assert ours[name].a.shape == theirs[name].a.shape


def test_random_starts_follow_from_seed_and_name():
    one, again, other = (gaussian(WEIGHTS, RANK, seed)["a"].a for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_forms():
    start = {"a": LowRank(torch.randn(6, 2), torch.randn(2, 5))}
    product = start["a"].b @ start["a"].a
    residual = halves(start, Form())
    assert residual.frozen is residual.trained
    assert torch.equal(residual.trained["a"].b, start["a"].b)
    scaled = halves(start, Form("scaled", 0.1)).trained["a"]
    torch.testing.assert_close(scaled.b @ scaled.a, 0.1 * product)
    alone = halves(start, Form("a-only"))
    assert alone.frozen is None
    half = alone.trained["a"]
    assert not half.b.any()
    torch.testing.assert_close(half.a.norm(dim=1), torch.full((2,), 3**-0.5))
    cosine = torch.nn.functional.cosine_similarity(half.a, start["a"].a)
    torch.testing.assert_close(cosine, torch.ones(2))


def test_leading_directions_of_a_start_are_the_start_of_lower_rank():
    high, low = principal(WEIGHTS, 4), principal(WEIGHTS, 2)
    for name, half in leading(high, 2).items():
        torch.testing.assert_close(half.b @ half.a, low[name].b @ low[name].a)
