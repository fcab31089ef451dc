"""Distances between activations, stages, and where a model keeps what it adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import tiny
from pkt.errors import IncompatibleError, UsageError
from pkt.records import Sample
from pkt.sublayers import layer_stack
from pkt.training import Stages, View, require_stages, watching
from pkt.training.activations import Readout, require_parts, require_readout
from pkt.training.distances import cosine_distances, fisher_distances, geometry_distance

SAMPLE = Sample("a", tuple(range(4, 24)), (False,) * 10 + (True,) * 10)


def rows(seed: int, count: int, width: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(2, 12), st.floats(1e-12, 1e12))
def test_ranges_and_what_changes_no_distance(seed: int, count: int, width: int, c: float) -> None:
    one, other = rows(seed, count, width), rows(seed + 1, count, width)
    cosines = cosine_distances(one, other)
    assert ((cosines >= -1e-6) & (cosines <= 2 + 1e-6)).all()
    geometry = geometry_distance(one, other)
    assert -1e-5 <= float(geometry) <= 1 + 1e-5
    assert float(geometry_distance(one, one)) == pytest.approx(0, abs=1e-5)
    turned = torch.linalg.qr(rows(seed + 2, width, width)).Q
    for changed in (c * other, other + rows(seed + 3, 1, width), other @ turned):
        assert float(geometry_distance(one, changed)) == pytest.approx(float(geometry), abs=1e-3)
    assert torch.allclose(cosine_distances(one, c * other), cosines, atol=1e-5)
    fisher = fisher_distances(one, other)
    assert (fisher >= 0).all()
    assert torch.allclose(fisher_distances(one + 3, other), fisher, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("count", "width"), [(3, 9), (9, 3), (5, 5)])
def test_geometry_by_tokens_and_by_channels(count: int, width: int) -> None:
    one, other = rows(0, count, width).double(), rows(1, count, width).double()
    j = torch.eye(count, dtype=torch.float64) - 1 / count
    k, kk = j @ one @ one.T @ j, j @ other @ other.T @ j
    wanted = 1 - float((k * kk).sum() / (k.norm() * kk.norm()))
    assert float(geometry_distance(one, other)) == pytest.approx(wanted, rel=1e-9)


def test_fisher_is_the_divergence_to_second_order() -> None:
    wanted, apart = rows(0, 4, 9).double(), 1e-3 * rows(1, 4, 9).double()
    p = wanted.softmax(-1)
    kl = (p * (wanted.log_softmax(-1) - (wanted + apart).log_softmax(-1))).sum(-1)
    assert torch.allclose(fisher_distances(wanted + apart, wanted), kl, rtol=1e-2)


def test_rows_that_are_all_the_same_have_no_geometry_and_no_gradient() -> None:
    flat = torch.ones(4, 6, requires_grad=True)
    loss = geometry_distance(flat, rows(0, 4, 6))
    loss.backward()
    assert float(loss.detach()) == 1
    assert float(flat.grad.abs().max()) == 0


@given(st.integers(1, 40), st.integers(0, 200), st.floats(0, 0.9))
def test_stages_share_the_steps_evenly(count: int, more: int, warmup: float) -> None:
    steps = count + more
    stages = Stages(tuple(range(1, count + 1)), steps, warmup)
    order = [stages.frontier(step) for step in range(steps)]
    assert order == sorted(order)
    sizes = [order.count(layer) for layer in stages.layers]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    rates = [stages.rate(step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    for layer in stages.layers:
        assert max(rate for rate, at in zip(rates, order, strict=True) if at == layer) == 1
    assert stages.rate(steps) == 0


def test_what_cannot_be_trained_in_stages() -> None:
    require_stages((), 1, 8)
    require_stages((1, 2), 2, 1)
    with pytest.raises(UsageError, match="each of 2 layers, found 1 steps"):
        require_stages((1, 2), 1, 1)
    with pytest.raises(UsageError, match="expected one process, found 2"):
        require_stages((1, 2), 9, 2)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_parts_and_readout_of_every_family(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.build(family, tmp_path, "student"))
    for layer in (1, 2, 3):
        require_parts(model, layer, SAMPLE)
    require_readout(model, 3, SAMPLE)
    layer_stack(model)[1][1].residual_multiplier = 2.0
    with pytest.raises(IncompatibleError, match="what attention and MLP of layer 2 add"):
        require_parts(model, 2, SAMPLE)


def test_a_model_that_reads_out_in_another_way_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.build("llama", tmp_path, "student"))
    model.lm_head.register_forward_hook(lambda module, args, output: output.square())
    good = Readout(model)(torch.ones(2, 32))
    assert good.shape == (2, 96)
    model.config.logit_scale = 0.5
    with pytest.raises(IncompatibleError, match="logits that are head"):
        require_readout(model, 3, SAMPLE)
    model.model.extra_norm = torch.nn.LayerNorm(32)
    with pytest.raises(IncompatibleError, match="expected one norm"):
        Readout(model)


def test_hooks_are_gone_after_the_forward_pass(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.build("llama", tmp_path, "student"))
    views = [View(2, name) for name in ("mlp", "attn", "block", "hidden", "span")]
    with watching(model, views) as seen:
        model(input_ids=torch.tensor([SAMPLE.tokens]))
    counted = torch.tensor([SAMPLE.loss_mask[1:]])
    assert {seen.of(view, counted).shape for view in views} == {(10, 32)}
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
