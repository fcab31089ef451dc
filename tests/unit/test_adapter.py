"""The folder is PEFT's: it loads on the real student, and adds W + BA and no more."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pkt
import runs
from pkt.adapter import adapter_config, adapter_tensors, check_adapter, write_adapter
from pkt.errors import PktError
from pkt.records import Factors
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
RANK = 4
IDS = torch.tensor([[1, 17, 30, 5, 99, 64, 2, 41]])


def made_for(folder: Path, family: str, **options: Any) -> tuple[Path, Path]:
    """Student and adapter of a tiny extraction; checkpoint options are ``big``, ``small``, …"""
    models = {key: options.pop(key) for key in ("tied", "big", "small") if key in options}
    teacher, student = build_pair(folder, family, family, **models)
    seeds = write_seeds(folder / "seeds.jsonl", count=2)
    options = {"rank": RANK, "dtype": "float32", **options}
    made = pkt.extract(str(teacher), str(student), seeds, folder / "out", **options)
    return student, made.folder


def plain(student: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    return model.eval()


def loaded(student: Path, adapter: Path) -> Any:
    """`PeftModel.from_pretrained` on the real student: warnings are errors in these tests."""
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(student), adapter).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def products(adapter: Path) -> dict[str, Tensor]:
    """BA of each module, in the orientation of its weight, from the file alone."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, a in tensors.items():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key):
            found[match[1]] = tensors[key.replace("lora_A", "lora_B")] @ a
        elif match := re.fullmatch(r"base_model\.model\.(.+)\.lora_embedding_A", key):
            b = tensors[key.replace("embedding_A", "embedding_B")]
            found[match[1]] = (b @ a).T
    return found


def merged(student: Path, adapter: Path) -> nn.Module:
    """The student with W + BA written by hand; tied tensors are parted where they then differ."""
    model, added = plain(student), products(adapter)
    for name, product in added.items():
        module = model.get_submodule(name)
        weight = module.weight
        assert isinstance(weight, Tensor)
        module.weight = nn.Parameter(weight.detach() + product)
    return model


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "balanced": ("llama", {"split": "balanced"}),
    "rows-cols": ("llama", {"select": "rows-cols"}),
    "consistent": ("llama", {"tied": False, "embeddings": True, "select": "consistent"}),
    "fused": ("phi3", {}),
    "interleaved": ("gpt_neox", {}),
    "soft caps": ("gemma2", {}),
    "targets": ("llama", {"targets": ("q", "mlp.down_proj")}),
    "patterns": ("llama", {"rank": 28, "small": {"kv_heads": 1, "intermediate": 24}}),
    "embeddings": ("llama", {"tied": False, "embeddings": True}),
    "embeddings, neox": ("gpt_neox", {"tied": False, "embeddings": True}),
    "targets, embeddings": ("llama", {"tied": False, "embeddings": True, "targets": ("v",)}),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_with_the_adapter_equals_the_merged_weights(case: str, tmp_path: Path) -> None:
    family, options = CASES[case]
    student, adapter = made_for(tmp_path, family, **dict(options))
    model = loaded(student, adapter)
    added = products(adapter)
    active = {n for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")
              and (m.lora_A or m.lora_embedding_A)}  # fmt: skip
    assert active == set(added), "exactly the modules of the file carry factors"
    ours, theirs = logits(model), logits(merged(student, adapter))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(theirs, logits(plain(student)), atol=1e-2), "the start is not zero"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_tied_student_takes_both_ends(family: str, tmp_path: Path) -> None:
    """PEFT adds each end's factors to its own use of the one tensor; it may warn of merging."""
    student, adapter = made_for(tmp_path, family, tied=True, embeddings=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`tie_word_embeddings=True`")
        model = loaded(student, adapter)
        ours = logits(model)
    assert {"model.embed_tokens", "lm_head"} <= products(adapter).keys()
    torch.testing.assert_close(ours, logits(merged(student, adapter)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "fused", "embeddings", "patterns"])
def test_every_key_of_the_file_lands_and_none_is_missing(case: str, tmp_path: Path) -> None:
    from peft import (
        LoraConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    family, options = CASES[case]
    student, adapter = made_for(tmp_path, family, **dict(options))
    model = get_peft_model(plain(student), LoraConfig.from_pretrained(adapter))  # type: ignore[arg-type]
    state = load_file(adapter / "adapter_model.safetensors")
    result = set_peft_model_state_dict(model, dict(state))
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora" in key] == []
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    lora = {key: value for key, value in held.items() if "lora" in key}
    assert lora.keys() == state.keys()
    assert all(torch.equal(lora[key], state[key]) for key in state)


def test_the_configuration(tmp_path: Path) -> None:
    student, adapter = made_for(tmp_path, "llama")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (RANK, RANK, "LORA")
    assert (config["lora_dropout"], config["bias"], config["task_type"]) == (
        0.0,
        "none",
        "CAUSAL_LM",
    )
    assert config["use_rslora"] is False
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    leaves = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == leaves
    assert config["base_model_name_or_path"] == str(student)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def random_factors(rows: int, columns: int, rank: int, seed: int) -> Factors:
    draw = torch.Generator().manual_seed(seed)
    b, a = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    return Factors(b, a, (1.0,) * rank, 0.0, 1.0)


def test_patterns_reach_their_module_and_no_other(tmp_path: Path) -> None:
    """Layers 1 and 11, whose names begin alike, of different ranks."""
    import tiny

    student = tiny.build("llama", tmp_path / "s", "student", layers=12, vocab=128)
    factors = {
        f"model.layers.{i}.self_attn.q_proj": random_factors(32, 32, rank, i)
        for i, rank in ((1, 2), (10, 4), (11, 3))
    }
    out = tmp_path / "out"
    out.mkdir()
    write_adapter(out, adapter_config(factors, 4, "s", every_layer=False),
                  adapter_tensors(factors, None))  # fmt: skip
    check_adapter(out, student)
    model = loaded(student, out)
    torch.testing.assert_close(logits(model), logits(merged(student, out)), rtol=1e-4, atol=1e-4)


def damaged(adapter: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_the_check_finds_missing_and_unexpected_keys(tmp_path: Path) -> None:
    student, adapter = made_for(tmp_path, "llama")
    check_adapter(adapter, student)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    other = key.replace("layers.1", "layers.7")
    without = damaged(adapter, tmp_path / "a", lambda tensors: tensors.pop(key))
    with pytest.raises(PktError, match=r"missing key .*layers\.1\.mlp\.up_proj\.lora_A"):
        check_adapter(without, student)
    more = damaged(adapter, tmp_path / "b", lambda t: t.update({other: t[key].clone()}))
    with pytest.raises(PktError, match=r"unexpected key .*layers\.7"):
        check_adapter(more, student)


def test_equal_factors_give_equal_files(tmp_path: Path) -> None:
    found = []
    for order in (1, -1):
        names = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(2) for m in "qv"][::order]
        factors = {n: random_factors(32, 32, 4, len(n) + ord(n[-6])) for n in names}
        out = tmp_path / f"{order}"
        out.mkdir()
        config = adapter_config(factors, 4, "s", every_layer=True)
        write_adapter(out, config, adapter_tensors(factors, None))
        found.append(runs.contents(out))
    assert found[0] == found[1]
