"""Loss of samples against transformers' plain forward and `F.cross_entropy`, one at a time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from pkt.errors import PktError
from pkt.evaluation import ExampleLoss, cross_entropy, logits, mean_loss
from pkt.records import Sample

VOCABULARY = 96


def _samples(count: int = 7) -> list[Sample]:
    seeds = tiny.random_seeds(VOCABULARY, count, (3, 30))
    return [Sample(f"t:{i}", tuple(t), tuple(m)) for i, (t, m) in enumerate(seeds)]


def _model(folder: Path, family: str, dtype: torch.dtype = torch.float32):
    tiny.build(family, folder, "student", vocab=VOCABULARY)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def _plain(model, sample: Sample) -> float:
    """One text alone, whole logits, F.cross_entropy over its answer tokens."""
    ids = torch.tensor([sample.tokens])
    found = model(input_ids=ids).logits[0, :-1].float()
    counted = torch.tensor(sample.loss_mask[1:])
    return float(F.cross_entropy(found[counted], ids[0, 1:][counted], reduction="sum"))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_each_sample_loses_what_it_loses_alone(tmp_path: Path, family: str) -> None:
    # Gemma 2's soft cap stands behind its head; sliding windows meet right padding.
    model = _model(tmp_path, family).eval()
    samples = _samples()
    found = cross_entropy(model, samples, batch_tokens=64)
    assert [f.name for f in found] == [s.name for s in samples]
    for loss, sample in zip(found, samples, strict=True):
        assert loss.tokens == sum(sample.loss_mask)
        assert loss.nll_sum == pytest.approx(_plain(model, sample), rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("cohere2", {}),  # scales its logits
        ("gemma4_text", {"vocab_size_per_layer_input": VOCABULARY}),  # hands on keys and values
        ("gpt2", {}),  # reads more of its decoder's output than the hidden state
        ("granite", {"logits_scaling": 3.0}),
        ("opt", {"word_embed_proj_dim": 16, "ffn_dim": 64}),  # its decoder lies one deeper
    ],
)
def test_other_shapes_of_causal_models(model_type: str, options: dict[str, float]) -> None:
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=64, bos_token_id=1,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for loss, sample in zip(cross_entropy(model, _samples()), _samples(), strict=True):
        assert loss.nll_sum == pytest.approx(_plain(model, sample), rel=1e-5)


def test_bfloat16_agrees_with_its_own_plain_loss(tmp_path: Path) -> None:
    model = _model(tmp_path, "llama", torch.bfloat16).eval()
    for loss, sample in zip(cross_entropy(model, _samples()), _samples(), strict=True):
        assert loss.nll_sum == pytest.approx(_plain(model, sample), rel=2e-2)


def test_batches_and_chunks_change_nothing_but_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = _model(tmp_path, "gemma2"), _samples(12)
    alone = cross_entropy(model, samples, batch_tokens=1)
    whole = cross_entropy(model, samples, batch_tokens=10**6)
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    chunked = cross_entropy(model, samples, batch_tokens=10**6)
    for a, b, c in zip(alone, whole, chunked, strict=True):
        assert a.nll_sum == pytest.approx(b.nll_sum, rel=1e-6)
        assert a.nll_sum == pytest.approx(c.nll_sum, rel=1e-6)


def test_modes_and_gradients_are_left_as_found(tmp_path: Path) -> None:
    model = _model(tmp_path, "llama").train()
    model.lm_head.eval()
    before = [(name, module.training) for name, module in model.named_modules()]
    cross_entropy(model, _samples(2))
    assert [(name, module.training) for name, module in model.named_modules()] == before
    assert "forward" not in vars(model.model)
    assert torch.is_grad_enabled()


def test_an_adapter_counts(tmp_path: Path) -> None:
    base = _model(tmp_path, "llama").eval()
    without = cross_entropy(base, _samples(3))
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).train()
    found = cross_entropy(model, _samples(3))  # dropout and train mode must not count
    model.eval()
    for loss, sample, other in zip(found, _samples(3), without, strict=True):
        assert loss.nll_sum == pytest.approx(_plain(model, sample), rel=1e-5)
        assert abs(loss.nll_sum - other.nll_sum) > 1e-3


def test_a_loss_that_is_not_finite_names_its_sample(tmp_path: Path) -> None:
    model = _model(tmp_path, "llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(PktError, match=r"t:\d: its loss is nan"):
        cross_entropy(model, _samples(2))


def test_the_mean_weighs_tokens_and_its_error_counts_examples() -> None:
    losses = [ExampleLoss("a", 6.0, 2), ExampleLoss("b", 2.0, 2), ExampleLoss("c", 10.0, 6)]
    mean, error = mean_loss(losses)
    assert mean == pytest.approx(1.8)
    squares = (6 - 3.6) ** 2 + (2 - 3.6) ** 2 + (10 - 10.8) ** 2
    assert error == pytest.approx(math.sqrt(3 / 2 * squares) / 10)
    assert math.isnan(mean_loss(losses[:1])[1])


def test_with_equal_lengths_the_error_is_the_usual_one() -> None:
    values = [1.0, 2.5, 3.0, 0.5]
    _, error = mean_loss([ExampleLoss("x", 4 * v, 4) for v in values])
    spread = math.sqrt(sum((v - 1.75) ** 2 for v in values) / 3)
    assert error == pytest.approx(spread / 2)


def test_no_logits_are_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the memory for a vocabulary of 128k: the head sees a few positions at a time."""
    model = _model(tmp_path, "llama")
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 5 * VOCABULARY)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    cross_entropy(model, _samples())
    assert max(sizes) == 5 * VOCABULARY
    counted = sum(sample.loss_tokens for sample in _samples())
    assert sum(sizes) == counted * VOCABULARY  # and answer positions only
