"""Opening a model: names, what is refused before a weight is read, and what the manifest hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from pkt.errors import CheckpointError, IncompatibleError, PktError, UsageError
from pkt.models import load_tokenizer, open_model, resolve
from pkt.sublayers import layer_stack
from pkt.sweep import build_skeleton

F32 = torch.float32
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def with_config(folder: Path, **entries: Any) -> Path:
    """Change entries of a tiny model's configuration; ``None`` removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **entries}
    gone = {key for key, value in entries.items() if value is None}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in gone}))
    return folder


def store(folder: Path, model_type: str, **entries: Any) -> Path:
    """A tiny random checkpoint of any family that transformers has a causal model of."""
    config = AutoConfig.for_model(model_type, **{**SMALL, **entries})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def refused(folder: Path) -> str:
    """Opening names the family and ends with exit code 3."""
    with pytest.raises(IncompatibleError) as caught:
        open_model(str(folder), {}, "teacher")
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shapes_of_every_family(family: str, tmp_path: Path) -> None:
    model = open_model(str(tiny.build(family, tmp_path)), {})
    config = AutoConfig.from_pretrained(tmp_path)
    assert model.family == config.model_type
    assert (model.layers, model.hidden_size, model.heads) == (4, 48, 6)
    assert model.kv_heads == (6 if "neox" in family else 3)
    assert model.head_dim == (getattr(config, "head_dim", None) or 8)
    assert model.positions == 256
    assert model.embedding.shape == (96, 48)
    assert (model.head is None) == bool(config.tie_word_embeddings)


def test_names_are_folders_then_aliases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    aliases = {"70b": "models/70b", "small": "~/small"}
    assert resolve("70b", aliases) == "models/70b"
    assert resolve("small", aliases) == str(Path.home() / "small")
    assert resolve("other", aliases) == "other"
    (tmp_path / "70b").mkdir()
    assert resolve("70b", aliases) == "70b"
    tiny.build("llama", tmp_path / "models" / "tiny")
    model = open_model("t", {"t": str(tmp_path / "models" / "tiny")})
    assert (model.name, model.source) == ("t", str(tmp_path / "models" / "tiny"))


@pytest.mark.parametrize("name", ["./gone", "/no/such/folder", "a/b/c", "~nobody/x"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(UsageError, match=r"teacher .*no such folder") as caught:
        open_model(name, {}, "teacher")
    assert caught.value.exit_code == 2


def test_offline_a_hub_id_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="someone/some-model") as caught:
        open_model("big", {"big": "someone/some-model"}, "teacher")
    assert "alias 'big'" in str(caught.value)
    assert "download it first" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "no config.json"), ("{", "cannot be read as JSON"), ("[]", "expected a JSON object"),
     ('{"model_type": "llama"}', "'llama' does not say how many layers it has"),
     ('{"model_type": "llama", "num_hidden_layers": "4"}', 'found "4"'),
     ('{"num_hidden_layers": 2}', "names no model_type")],
)  # fmt: skip
def test_a_configuration_that_says_nothing(content: str | None, text: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PktError, match=text) as caught:
        open_model(str(tmp_path), {})
    assert str(tmp_path) in str(caught.value)


def test_mixtures_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    experts = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    for family, entries in (
        ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 1}),
        ("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, **experts}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, **experts}),
    ):
        text = refused(store(tmp_path / family, family, **entries))
        assert f"'{family}' is a mixture of experts" in text


def test_experts_in_the_tensors_alone_are_refused_too(tmp_path: Path) -> None:
    folder = store(tmp_path, "mixtral", num_local_experts=2, num_experts_per_tok=1)
    text = refused(with_config(folder, num_local_experts=None))
    assert "mixture of experts" in text


def test_a_state_space_model_is_no_mixture_of_experts(tmp_path: Path) -> None:
    """Refused, and for what it is: its convolutions have three dimensions, experts or not."""
    text = refused(store(tmp_path, "mamba", state_size=4, intermediate_size=64))
    assert "mamba" in text
    assert "mixture of experts" not in text


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
def test_quantized_weights_are_refused_by_method(method: str, tmp_path: Path) -> None:
    folder = with_config(
        tiny.build("llama", tmp_path), quantization_config={"quant_method": method}
    )
    assert f"quantized ({method})" in refused(folder)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "BertForMaskedLM"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5For"),
        ({"architectures": None, "model_type": "roberta"}, "roberta"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_what_is_no_causal_model_is_refused(
    entries: dict[str, Any], text: str, tmp_path: Path
) -> None:
    found = refused(with_config(tiny.build("llama", tmp_path), **entries))
    assert "expected a decoder-only language model" in found
    assert text in found


def test_vision_language_models_are_refused(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path)
    text = json.loads((folder / "config.json").read_text())
    entries = {"model_type": "llava", "text_config": text, "vision_config": {}}
    assert "'llava' holds more than a text decoder" in refused(with_config(folder, **entries))


def test_hashes_follow_what_matters(tmp_path: Path) -> None:
    folder = tiny.build("llama", tmp_path / "a")
    first = open_model(str(folder), {}).hashes()
    same = open_model(str(with_config(folder, _name_or_path="x", transformers_version="9")), {})
    assert same.hashes() == first
    assert open_model(str(with_config(folder, rope_theta=5.0)), {}).hashes() != first
    assert str(tmp_path) not in json.dumps(first)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    model = open_model(str(tiny.build("llama", tmp_path)), {})
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded") as caught:
        load_tokenizer(model)
    assert str(tmp_path) in str(caught.value)
    tiny.write_tokenizer(tmp_path, 120)
    assert load_tokenizer(model).eos_token_id == 2


class TestSkeleton:
    """What the sweep would compute wrongly is refused when the model is built or first called."""

    def test_parameters_are_on_meta_and_buffers_are_not(self, tmp_path: Path) -> None:
        skeleton = build_skeleton(tiny.build("llama", tmp_path, tied=True), F32)
        assert {p.device.type for p in skeleton.model.parameters()} == {"meta"}
        assert {b.device.type for b in skeleton.model.buffers()} == {"cpu"}
        assert skeleton.may_tie
        assert skeleton.embedding != skeleton.head
        assert skeleton.layers_path == "model.layers"
        assert skeleton.outer == ("model.norm.weight",)

    def test_a_family_that_changes_states_between_layers(self, tmp_path: Path) -> None:
        skeleton = build_skeleton(tiny.build("llama", tmp_path), F32)
        stack = skeleton.model.get_submodule("model.layers")
        assert isinstance(stack, nn.ModuleList)
        recorder = stack[1]
        weights = {"model.norm.weight": torch.ones(48)}
        rows = torch.zeros(3, 48)
        skeleton.prefix(rows, weights)  # as it is, it passes

        class Doubling(nn.Module):
            def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
                return recorder(2 * hidden, *args, **kwargs)

        stack[1] = Doubling()
        with pytest.raises(IncompatibleError, match=r"'llama'.* between layers 0 and 1"):
            skeleton.prefix(rows, weights)

    def test_a_family_that_leaves_a_layer_out(self, tmp_path: Path) -> None:
        skeleton = build_skeleton(tiny.build("llama", tmp_path), F32)
        stack = skeleton.model.get_submodule("model.layers")
        assert isinstance(stack, nn.ModuleList)

        class Passing(nn.Module):
            def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
                return hidden

        stack[2] = Passing()
        with pytest.raises(IncompatibleError, match="does not call"):
            skeleton.prefix(torch.zeros(3, 48), {"model.norm.weight": torch.ones(48)})

    def test_a_family_whose_layers_lie_in_two_lists(self) -> None:
        """Encoder and decoder side by side; lists within a layer do not count."""

        def stack(inner: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleDict({"parts": nn.ModuleList(nn.Linear(2, 2) for _ in range(inner))})
                for _ in range(3)
            )

        model = nn.ModuleDict({"decoder": stack(3)})
        toy = AutoConfig.for_model("llama", num_hidden_layers=3)
        toy.model_type = "toy"
        model.config = toy
        path, found = layer_stack(model)
        assert (path, found) == ("decoder", model["decoder"])
        model["encoder"] = stack(2)
        with pytest.raises(IncompatibleError, match=r"'toy'.*3 decoder layers in one.*found 2"):
            layer_stack(model)
        toy.num_hidden_layers = 7
        with pytest.raises(IncompatibleError, match="found 0"):
            layer_stack(model)

    def test_code_of_the_checkpoint_is_not_run(self, tmp_path: Path) -> None:
        folder = tiny.build("llama", tmp_path / "m")
        (folder / "evil.py").write_text("open('/tmp/pkt-evil', 'w')\n")
        with_config(
            folder, model_type="strange",
            auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        )  # fmt: skip
        with pytest.raises(IncompatibleError, match="transformers cannot build this model"):
            build_skeleton(folder, F32)
        assert not Path("/tmp/pkt-evil").exists()
