"""The reference's matrix part against quadruple loops, hand counts and transformers itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import repeat_kv

import reference

torch.set_num_threads(1)
F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("kind", ["float", "integer", "ties"])
def test_window_equals_a_quadruple_loop(kind: str) -> None:
    for n, m in [(1, 1), (1, 6), (5, 1), (6, 7)]:
        scores = randn(n, m, seed=n).abs()
        if kind == "integer":
            scores = (scores * 2**40).to(torch.int64)
        if kind == "ties":
            scores = (scores * 2).round()
        for rows, cols in itertools.product(range(1, n + 1), range(1, m + 1)):
            best = (-1, 0, 0)
            for r in range(n - rows + 1):
                for c in range(m - cols + 1):
                    total = 0
                    for i in range(rows):
                        for j in range(cols):
                            total += scores[r + i, c + j].item()
                    if total > best[0]:
                        best = (total, r, c)
            row, column, total = reference.best_window(scores, rows, cols)
            assert (row, column) == best[1:]
            assert total == pytest.approx(best[0], rel=1e-12)
            direct = reference.window_sum(scores, row, column, rows, cols)
            assert direct == pytest.approx(best[0], rel=1e-12)


def test_window_ties_survive_rounding() -> None:
    """Among the copies of a kv head all windows of its height tie; their table sums do not."""
    for seed in range(20):
        head = randn(8, 9, seed=seed).abs()
        scores = reference.expand_kv(head, head_dim=4, repeat=3, share=True)
        row, column, _ = reference.best_window(scores, 4, 5)
        first, start, _ = reference.best_window(head, 4, 5)
        if first in (0, 4):
            assert (row, column) == (3 * first, start)
    assert reference.best_window(torch.ones(5, 5) / 3, 2, 2)[:2] == (0, 0)


def test_window_of_equal_shape_is_the_whole_matrix() -> None:
    scores = randn(4, 6).abs()
    assert reference.best_window(scores, 4, 6) == (0, 0, pytest.approx(float(scores.sum())))
    with pytest.raises(ValueError, match="does not fit"):
        reference.best_window(scores, 5, 6)


def test_gap_to_the_runner_up_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 5.0]])  # windows of two: 3 and 7
    assert reference.window_gap(scores, 1, 2) == pytest.approx(4 / 7)
    assert reference.window_gap(scores, 1, 3) == float("inf")
    assert reference.window_gap(torch.ones(3, 3), 2, 2) == 0


def test_rows_cols_and_top_weights_by_hand() -> None:
    scores = torch.tensor([[5.0, 0.0, 1.0], [0.0, 2.0, 0.0], [1.0, 4.0, 1.0], [1.0, 1.0, 4.0]])
    rows, cols = reference.rows_cols(scores, 2, 2)  # rows 6 2 6 6, columns 7 7 6
    assert (rows.tolist(), cols.tolist()) == ([0, 2], [0, 1])
    assert reference.top_weights(scores, 2, 3).tolist() == [0, 2, 4, 6, 7, 11]  # 5 . 4 4 2 and 1s


def test_expand_kv_is_repeat_kv_and_keeps_the_total() -> None:
    rows = randn(6, 5).abs()  # 2 heads of 3
    weights = reference.expand_kv(rows, head_dim=3, repeat=4, share=False)
    theirs = repeat_kv(rows.reshape(1, 2, 3, 5), 4).reshape(24, 5)
    assert torch.equal(weights, theirs)
    shared = reference.expand_kv(rows, head_dim=3, repeat=4, share=True)
    torch.testing.assert_close(shared, weights / 4)
    assert float(shared.sum()) == pytest.approx(float(rows.sum()))


def test_phi3_parts_are_the_rows_its_forward_slices() -> None:
    config = AutoConfig.for_model(
        "phi3", hidden_size=8, num_attention_heads=4, num_key_value_heads=2
    )
    rows = torch.arange(16.0)[:, None]
    kind = ("phi3", config, "self_attn.qkv_proj")
    parts = reference.split_fused(*kind, rows)
    assert {n: p[:, 0].tolist() for n, p in parts.items()} == {
        "self_attn.q_proj": list(range(8)),
        "self_attn.k_proj": list(range(8, 12)),
        "self_attn.v_proj": list(range(12, 16)),
    }
    assert torch.equal(reference.stack_fused(*kind, parts), rows)
    halves = reference.split_fused("phi3", config, "mlp.gate_up_proj", rows)
    assert halves["mlp.up_proj"][0] == 8
    assert reference.split_fused("phi3", config, "mlp.down_proj", rows) == {"mlp.down_proj": rows}


def test_gpt_neox_parts_are_the_chunks_its_forward_takes() -> None:
    config = AutoConfig.for_model("gpt_neox", hidden_size=6, num_attention_heads=3)
    weight, x = randn(18, 6), randn(1, 5, 6, seed=1)
    kind = ("gpt_neox", config, "attention.query_key_value")
    chunks = (x @ weight.T).view(1, 5, -1, 3 * 2).transpose(1, 2).chunk(3, dim=-1)
    parts = reference.split_fused(*kind, weight)
    for part, theirs in zip(parts.values(), chunks, strict=True):
        mine = (x @ part.T).view(1, 5, 3, 2).transpose(1, 2)
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(reference.stack_fused(*kind, parts), weight)


@pytest.mark.parametrize("split", ["paper", "balanced"])
@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (3, 3), (1, 4)])
def test_factors_leave_the_tail_of_the_spectrum(shape: tuple[int, int], split: str) -> None:
    """Eckart-Young: ‖W - BA‖² = Σ_{i>r} σ_i²; signs and split as written."""
    w = randn(*shape)
    sigma = torch.linalg.svdvals(w)
    for rank in range(1, 8):
        f = reference.factors(w, rank, split)
        r = min(rank, *shape)
        assert (f.a.shape, f.b.shape) == ((r, shape[1]), (shape[0], r))
        left = float((w - f.b @ f.a).square().sum())
        assert left == pytest.approx(float(sigma[r:].square().sum()), abs=1e-12)
        root = sigma[:r] if split == "paper" else sigma[:r].sqrt()
        torch.testing.assert_close(f.b.norm(dim=0), root)
        torch.testing.assert_close(
            f.a.norm(dim=1), torch.ones(r) if split == "paper" else root, check_dtype=False
        )
        for column in f.b.T:
            assert column[column.abs().argmax()] > 0


def test_sign_rule_takes_the_first_of_equal_magnitudes() -> None:
    f = reference.factors(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 1)
    assert f.b[0, 0] > 0 > f.b[1, 0]
    assert f.a[0, 0] < 0
