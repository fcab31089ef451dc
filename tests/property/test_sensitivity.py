"""Law 2: S = Σ_j |θ · ∂L_j/∂θ|, the absolute value taken in every sample before the sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pkt
import reference
from pkt.sensitivity import (
    LayerScores,
    accumulate,
    accumulate_columns,
    accumulate_products,
    score_sum,
)
from test_extract import RANK, build_pair, compare, write_seeds

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def observer(elements: int) -> tuple[LayerScores, dict[str, Any]]:
    """A `LayerScores`, and what it hands out: matrices by name, the layer's score."""
    found: dict[str, Any] = {}

    def on_matrix(layer: int, module: str, scores: np.ndarray[Any, Any]) -> None:
        found[module] = scores.copy()

    def on_layer(layer: int, score: float) -> dict[str, Any]:
        return {"layer": layer, "score": score}

    return LayerScores(torch.full((elements,), 7.0), on_matrix, on_layer), found


def test_opposite_gradients_of_two_samples_do_not_cancel() -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 5, generator=draw), torch.randn(4, 5, generator=draw)
    dy = torch.randn(4, 6, generator=draw)
    scores, found = observer(100)
    for sign in (1.0, -1.0):
        assert all(scores.linear("q", weight, [x], [sign * dy]))
        assert scores.parameter("norm", weight[0], sign * x[0])
    scores.finish_matrix(0, "q", weight)
    expected = 2 * (weight * (dy.T @ x)).abs()
    torch.testing.assert_close(torch.from_numpy(found["q"]), expected)
    total = float(expected.double().sum() + 2 * (weight[0] * x[0]).abs().double().sum())
    assert scores.finish_layer(3) == {"layer": 3, "score": pytest.approx(total, rel=1e-6)}


def test_an_extraction_sums_absolute_values_and_not_gradients(tmp_path: Path) -> None:
    """The wrong order would lie far away on this very input, so the comparison can fail."""
    teacher, student = build_pair(tmp_path, "llama", "llama")
    seeds = write_seeds(tmp_path / "seeds.jsonl", count=12)
    task = pkt.api.prepare(str(teacher), str(student), seeds, rank=RANK, dtype="float32")
    made = pkt.api.execute(task, tmp_path / "out")
    tokens = [(list(seed.tokens), list(seed.loss_mask)) for seed in task.seeds.samples]
    wanted = reference.extract(teacher, student, tokens, RANK)
    compare(made, wanted)
    model = reference.load(teacher)
    sum(reference.seed_loss(model, *seed) for seed in tokens).backward()  # type: ignore[union-attr]
    wrong = {
        name: (parameter.detach() * parameter.grad).abs()
        for name, parameter in model.named_parameters() if parameter.grad is not None
    }  # fmt: skip
    totals = reference.layer_scores(wrong, "model.layers", 4)
    ratio = totals / torch.tensor(made.manifest["layer_scores"], dtype=torch.float64)
    assert float(ratio.max()) < 0.75


def test_a_seed_twice_counts_twice(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama")
    seeds = write_seeds(tmp_path / "seeds.jsonl", count=3)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(seeds.read_text() * 2)
    once, both = (
        pkt.extract(str(teacher), str(student), path, tmp_path / path.stem, rank=RANK)
        for path in (seeds, twice)
    )
    doubled = [2 * score for score in once.manifest["layer_scores"]]
    assert both.manifest["layer_scores"] == pytest.approx(doubled, rel=1e-6)
    assert both.manifest["loss"] == pytest.approx(once.manifest["loss"], rel=1e-9)
    assert both.manifest["layers"] == once.manifest["layers"]


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_accumulate_equals_numpy_for_every_pair_of_types(
    weight_dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    """One float32 product, one float32 addition: the same bits."""
    draw = torch.Generator().manual_seed(1)
    for size in (0, 1, 2, 15, 16, 17, 31, 33, 1000, (1 << 16) - 1, (1 << 17) + 5):
        scores, expected = torch.zeros(size), np.zeros(size, dtype=np.float32)
        for _ in range(2):
            weight = torch.randn(size, generator=draw).to(weight_dtype)
            gradient = torch.randn(size, generator=draw).to(gradient_dtype)
            assert accumulate(weight, gradient, scores)
            expected += np.abs(weight.float().numpy() * gradient.float().numpy())
        assert scores.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_column_sums_equal_numpy(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(2)
    for rows, columns in ((1, 1), (7, 5), (300, 33), (5000, 17)):
        sums, expected = torch.zeros(columns, dtype=torch.float64), np.zeros(columns)
        for _ in range(2):
            weight = torch.randn(rows, columns, generator=draw).to(dtype)
            gradient = torch.randn(rows, columns, generator=draw).to(dtype)
            assert accumulate_columns(weight, gradient, sums)
            products = np.abs(weight.float().numpy() * gradient.float().numpy())
            expected += products.astype(np.float64).sum(0)
        np.testing.assert_allclose(sums.numpy(), expected, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2.0**60, width=32), max_size=500))
def test_score_sum_is_that_of_float64(values: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    assert score_sum(scores) == pytest.approx(sum(map(float, scores)), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_blocks_are_the_gradient_of_autograd(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of 5 rows, the last one shorter, and in one: the same bits."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(52, 40, generator=draw).to(dtype)
    x = torch.randn(9, 40, generator=draw).to(dtype)
    dy = torch.randn(9, 52, generator=draw).to(dtype)
    leaf = weight.clone().requires_grad_()
    torch.nn.functional.linear(x, leaf).backward(dy)
    assert leaf.grad is not None
    expected = (weight.float() * leaf.grad.float()).abs().numpy()
    for elements in (200, 1 << 20):
        monkeypatch.setattr("pkt.sensitivity.BLOCK_ELEMENTS", elements)
        scores, found = observer(weight.numel())
        assert all(scores.linear("up", weight, [x], [dy]))
        scores.finish_matrix(0, "up", weight)
        rtol = 1e-5 if dtype == torch.float32 else 1e-2  # one unit in the last place of bfloat16
        np.testing.assert_allclose(found["up"], expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("kind", DTYPES)
def test_products_in_registers_are_those_of_float64(kind: torch.dtype) -> None:
    """Samples of any length, views among them; the same bits together and one by one."""
    draw = torch.Generator().manual_seed(4)
    for rows, columns, lengths in ((1, 1, [1]), (70, 530, [3, 0, 300]), (301, 65, [7, 7, 513, 2])):
        weight = torch.randn(rows, columns, generator=draw).to(kind)
        xs = [torch.randn(n + 1, columns, generator=draw).bfloat16()[1:] for n in lengths]
        dys = [torch.randn(rows, n, generator=draw).bfloat16().T for n in lengths]
        together, alone = torch.zeros(rows, columns), torch.zeros(rows, columns)
        assert accumulate_products(weight, xs, dys, together) is None
        for x, dy in zip(xs, dys, strict=True):
            assert accumulate_products(weight, [x], [dy], alone) is None
        assert torch.equal(together, alone)
        expected, bound = torch.zeros(2, rows, columns, dtype=torch.float64)
        for x, dy in zip(xs, dys, strict=True):
            expected += (weight.double() * (dy.double().T @ x.double())).abs()
            bound += weight.double().abs() * (dy.double().abs().T @ x.double().abs())
        assert float(((together - expected).abs() - 1e-6 * bound).max()) <= 0


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_noticed(bad: float, kind: torch.dtype) -> None:
    for broken in ("weight", "x", "dy"):
        sides = {"x": [torch.ones(3, 5) for _ in range(3)], "dy": [torch.ones(3, 6)] * 3}
        weight = torch.ones(6, 5)
        broken_one = weight if broken == "weight" else sides[broken][1].clone()
        broken_one[2, 4] = bad
        if broken != "weight":
            sides[broken] = [sides[broken][0], broken_one, sides[broken][2]]
        scores, _ = observer(100)
        xs, dys = ([each.to(kind) for each in side] for side in sides.values())
        found = scores.linear("q", weight.to(kind), xs, dys)
        assert list(found) == ([False] * 3 if broken == "weight" else [True, False, False]), broken
    scores, _ = observer(100)
    assert not scores.parameter("norm", torch.ones(4), torch.tensor([1.0, bad, 1.0, 1.0]))
    assert scores.parameter("norm", torch.ones(4), torch.ones(4)) is False, "NaN stays in the sum"


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[2], [0, 1, 1]])
def test_the_memory_of_a_layer_serves_the_next_one(kind: torch.dtype, lengths: list[int]) -> None:
    """Scores begin at zero each time, whatever lay there."""
    scores, found = observer(60)
    weight = torch.ones(5, 6, dtype=kind)
    xs, dys = ([torch.ones(n, width, dtype=kind) for n in lengths] for width in (6, 5))
    for layer in range(3):
        for module in ("q", "k"):
            assert all(scores.linear(module, weight, xs, dys))
        for module in ("q", "k"):
            scores.finish_matrix(layer, module, weight)
            assert (found[module] == 2).all()
        assert scores.finish_layer(layer)["score"] == 120


def test_a_module_that_no_sample_reached_scores_zero() -> None:
    scores, found = observer(30)
    scores.finish_matrix(0, "q", torch.ones(5, 6))
    assert (found["q"] == 0).all()
    assert scores.finish_layer(0) == {"layer": 0, "score": 0.0}
