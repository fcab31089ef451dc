"""Any PEFT LoRA folder is read as PEFT means it; what is more than a LoRA is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from pkt.adapter import read_adapter
from pkt.errors import CheckpointError, IncompatibleError, PktError


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("student"), "student", tied=False)


def saved(student: Path, folder: Path, **config: Any) -> Any:
    """An adapter as plain PEFT saves it, with random factors; the model."""
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **config}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **chosen))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 5}},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "lora_alpha": 3},
    ],
    ids=["plain", "rslora", "patterns", "ends"],
)
def test_products_are_what_peft_adds(student: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    model = saved(student, tmp_path, **config)
    found = read_adapter(tmp_path)
    layers = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "get_delta_weight") and module.r
    }
    assert found.factors.keys() == layers.keys()
    for name, half in found.factors.items():
        product = half.b @ half.a
        product = product.T if name in found.embeddings else product
        torch.testing.assert_close(product, layers[name].get_delta_weight("default").detach())
    assert found.embeddings == {name for name in layers if "embed" in name}
    assert found.rank == max(max(module.r.values()) for module in layers.values())
    assert found.manifest is None
    assert found.base_model == str(student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_16_bits_are_widened(student: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    saved(student, tmp_path, lora_alpha=4)
    path = tmp_path / "adapter_model.safetensors"
    short = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(short, path)
    half = read_adapter(tmp_path).factors["model.layers.0.self_attn.q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert half.a.dtype == torch.float32
    assert torch.equal(half.a, short[key].float())


def test_the_hash_follows_weights_and_configuration(student: Path, tmp_path: Path) -> None:
    saved(student, tmp_path)
    hashes = {read_adapter(tmp_path).sha256, read_adapter(tmp_path).sha256}
    edit(tmp_path, lora_alpha=9)
    hashes.add(read_adapter(tmp_path).sha256)
    change(tmp_path, lambda tensors: next(iter(tensors.values())).add_(1))
    hashes.add(read_adapter(tmp_path).sha256)
    assert len(hashes) == 3


@pytest.mark.filterwarnings("ignore")  # PEFT, of what it is asked for
@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ],
)
def test_more_than_factors_is_refused(
    student: Path, tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    saved(student, tmp_path, **config)
    with pytest.raises(IncompatibleError) as refusal:
        read_adapter(tmp_path)
    assert named in refusal.value.message
    assert refusal.value.hint
    assert "\n" not in refusal.value.message


def test_another_kind_of_adapter_is_refused(student: Path, tmp_path: Path) -> None:
    from peft import IA3Config

    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    )  # fmt: skip
    get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(IncompatibleError, match="expected a LoRA adapter, found IA3"):
        read_adapter(tmp_path)


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def edit(folder: Path, **entries: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def empty(factor: torch.Tensor) -> torch.Tensor:
    """The factor of rank 0."""
    return factor[:0].clone() if factor.shape[0] == 4 else factor[:, :0].clone()


B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[PktError], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), CheckpointError, "found no adap"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(), CheckpointError, "found no adapter_m",
    ),
    "no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"), CheckpointError, "cannot be read as",
    ),
    "a list": (
        lambda f: (f / "adapter_config.json").write_text("[]"), CheckpointError, "expected a JSON",
    ),
    "cut short": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-8]
        ),
        CheckpointError, "cannot be read",
    ),
    "NaN": (
        lambda f: change(f, lambda t: t[A].fill_(float("nan"))), CheckpointError, "no finite LoRA",
    ),
    "half a pair": (lambda f: change(f, lambda t: t.pop(A)), CheckpointError, "lacks a factor"),
    "ranks": (lambda f: edit(f, r=3), CheckpointError, "expected rank 3"),
    "no rank": (lambda f: edit(f, r=None), CheckpointError, "expected a number"),
    "no factors": (
        lambda f: change(f, lambda t: [t.pop(name) for name in list(t)]), CheckpointError,
        "expected LoRA factors, found none",
    ),
    "magnitudes": (
        lambda f: change(
            f, lambda t: t.update({"base_model.model.x.lora_magnitude_vector": torch.ones(2)})
        ),
        IncompatibleError, "DoRA",
    ),
    "transposed": (lambda f: edit(f, fan_in_fan_out=True), IncompatibleError, "transposed"),
    "manifest": (
        lambda f: (f / "pkt_manifest.json").write_text("{"), CheckpointError, "cannot be read as",
    ),
    "a manifest without end": (
        lambda f: (f / "pkt_manifest.json").write_text("[" * 200_000), CheckpointError,
        "nested too deeply",
    ),
    "a config without end": (
        lambda f: (f / "adapter_config.json").write_text("[" * 200_000), CheckpointError,
        "nested too deeply",
    ),
    "a pipe for a config": (
        lambda f: piped(f / "adapter_config.json"), CheckpointError, "found a pipe",
    ),
    "a pipe for weights": (
        lambda f: piped(f / "adapter_model.safetensors"), CheckpointError, "found a pipe",
    ),
    "a device for a manifest": (
        lambda f: (f / "pkt_manifest.json").symlink_to("/dev/zero"), CheckpointError,
        "found a device",
    ),
    "a list of patterns": (
        lambda f: edit(f, rank_pattern=["q_proj"]), CheckpointError, "expected an object",
    ),
    "a pattern that is none": (
        lambda f: edit(f, rank_pattern={"(": 3}), CheckpointError, "expected patterns",
    ),
    "an alpha beyond floats": (
        lambda f: edit(f, lora_alpha=10**400), CheckpointError, "expected a number",
    ),
    "an alpha beyond float32": (
        lambda f: edit(f, lora_alpha=1e300), CheckpointError, "expected a number",
    ),
    "an alpha that makes B infinite": (
        lambda f: change(f, lambda t: t[B].fill_(3e38)), CheckpointError, "infinite",
    ),
    "no rank at all": (
        lambda f: (change(f, lambda t: t.update({n: empty(x) for n, x in t.items()})),
                   edit(f, r=0)),
        CheckpointError, "1 at least",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(student: Path, tmp_path: Path, case: str) -> None:
    saved(student, tmp_path)
    damage, kind, text = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(kind) as refusal:
        read_adapter(tmp_path)
    assert text in refusal.value.message
    assert str(tmp_path) in refusal.value.message
    assert "\n" not in refusal.value.message
