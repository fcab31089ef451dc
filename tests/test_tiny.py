"""The tiny checkpoints are what the tests take them for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tiny

torch.set_num_threads(1)
SLIDING = ["mistral", "qwen2_sliding", "gemma2", "gemma3", "phi3", "olmo3"]


def load(folder: Path, **config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, count: int = 1) -> Tensor:
    rows = [
        model(input_ids=torch.tensor([ids])).logits[0] for ids, _ in tiny.random_seeds(96, count)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("size", list(tiny.SIZES))
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_a_checkpoint_reloads_whole(family: str, size: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path, size, shards=3)
    assert len(set(tiny.stored_names(tmp_path).values())) >= 3
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert all(p.detach().abs().min() > 0 for p in model.parameters())
    out = logits(model.eval())
    assert out.isfinite().all()
    assert float((out[1:] - out[:-1]).abs().amax(1).min()) > 0.1
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_attention_is_far_from_uniform(family: str, tmp_path: Path) -> None:
    model = load(tiny.build(family, tmp_path))
    model.set_attn_implementation("eager")
    ids = torch.tensor([tiny.random_seeds(96, 1)[0][0]])
    for weights in model(input_ids=ids, output_attentions=True).attentions:
        seen = (weights[0, :, 8:] > 0).sum(-1)
        assert float((weights[0, :, 8:].amax(-1) * seen).mean()) > 1.8  # uniform: 1


@pytest.mark.parametrize("family", SLIDING)
def test_the_sliding_window_changes_logits(family: str, tmp_path: Path) -> None:
    tiny.build(family, tmp_path)
    wide = load(tmp_path, sliding_window=64)
    assert float((logits(load(tmp_path)) - logits(wide)).abs().max()) > 0.1


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_each_soft_cap_changes_the_loss(cap: str, tmp_path: Path) -> None:
    tiny.build("gemma2", tmp_path)
    capped, free = load(tmp_path), load(tmp_path, **{cap: None})
    ids = torch.tensor([tiny.random_seeds(96, 1)[0][0]])
    losses = [m(input_ids=ids, labels=ids).loss.item() for m in (capped, free)]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_parallel_and_sequential_residual_differ(tmp_path: Path) -> None:
    for family in ("gpt_neox", "gpt_neox_sequential"):
        tiny.build(family, tmp_path / family)
    both = [logits(load(tmp_path / f)) for f in ("gpt_neox", "gpt_neox_sequential")]
    assert float((both[0] - both[1]).abs().max()) > 0.1


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_tied_and_untied(family: str, tmp_path: Path) -> None:
    for tied in (True, False):
        folder = tiny.build(family, tmp_path / str(tied), tied=tied)
        model = load(folder)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (embedding.weight is head.weight) is tied
        heads = {"lm_head.weight", "embed_out.weight"} & set(tiny.stored_names(folder))
        assert bool(heads) is not tied
        assert logits(model).isfinite().all()


def test_equal_arguments_give_equal_files(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tiny.build("qwen2", tmp_path / name, dtype=torch.bfloat16, seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "a").dtype == torch.bfloat16


def test_seeds_are_longer_than_the_window_and_mask_a_prompt() -> None:
    seeds = tiny.random_seeds(96, 50, seed=5)
    assert seeds == tiny.random_seeds(96, 50, seed=5)
    for ids, mask in seeds:
        assert 2 * tiny.WINDOW < len(ids) == len(mask) <= 4 * tiny.WINDOW
        assert not mask[0]
        assert mask == sorted(mask)
        assert sum(mask) >= len(ids) / 2


@pytest.mark.parametrize("vocab_size", [110, 128, 300, 512])
@pytest.mark.parametrize("template", [None, tiny.CHATML, tiny.CHATML_MARKED])
@pytest.mark.parametrize("bos", [True, False])
def test_tokenizer_round_trips(
    vocab_size: int, template: str | None, bos: bool, tmp_path: Path
) -> None:
    count = tiny.write_tokenizer(tmp_path, vocab_size, bos, template)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert count == len(tokenizer) <= vocab_size
    text = "What is 17 + 4?\n\tIt is 21." + (" Zürich 東京" if vocab_size >= 300 else "")
    ids = tokenizer(text)["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id == 1) is bos
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.unk_token_id not in ids
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 3)
    assert tokenizer.eos_token_id == (5 if template else 2)
    if template is None:
        assert tokenizer.chat_template is None
        return
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    both = tokenizer.apply_chat_template(chat)["input_ids"]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
    assert both[: len(prompt)] == prompt
    assert tokenizer.decode(both[len(prompt) :]) == "2<|im_end|>\n"
    if template == tiny.CHATML_MARKED:
        marked = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
        answer = [
            i for i, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m
        ]
        assert tokenizer.decode(answer) == "2<|im_end|>"
