"""Law 1 for every way to store a checkpoint: shards, element types, names, tied heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pkt
import reference
from pkt.errors import CheckpointError
from test_extract import RANK, build_pair, compare, run_both, write_seeds

torch.set_num_threads(1)
Tensors = dict[str, torch.Tensor]
ADAPTER = "adapter_model.safetensors"


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Store the tensors of a one-file checkpoint anew."""
    path = folder / "model.safetensors"
    changed = change(load_file(path))
    path.unlink()
    save_file({name: t.contiguous() for name, t in changed.items()}, path, {"format": "pt"})


def factors_of(folder: Path) -> bytes:
    return (folder / ADAPTER).read_bytes()


def compare_loosely(made: Any, wanted: dict[str, Any], teacher: Path, rtol: float) -> None:
    """For sums of rounded gradients: near the best in the reference's scores, factors exact.

    What was cut must be the stored weights at the places that the manifest names.
    """
    manifest = made.manifest
    assert manifest["layer_scores"] == pytest.approx(wanted["layer_scores"].tolist(), rel=rtol)
    assert manifest["layers"] == wanted["layers"]
    stored, tensors = load_file(teacher / "model.safetensors"), load_file(made.folder / ADAPTER)
    for name, window in manifest["windows"].items():
        source = f"{window['teacher']}.weight"
        rows, cols = slice(*window["rows"]), slice(*window["cols"])
        total = float(wanted["scores"][source][rows, cols].sum())
        best = float(wanted["modules"][name]["parts"][name.split(".", 3)[3]].total)
        assert window["score"] == pytest.approx(total, rel=rtol)
        assert best * (1 - rtol) <= total <= best * (1 + 1e-9)
        theirs = reference.factors(stored[source][rows, cols].double(), RANK)
        a = tensors[f"base_model.model.{name}.lora_A.weight"].double()
        b = tensors[f"base_model.model.{name}.lora_B.weight"].double()
        torch.testing.assert_close(b @ a, theirs.b @ theirs.a, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_equal_full_autograd_and_the_single_file(tied: bool, tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    results = []
    for folder, shards in ((one, None), (several, 4)):
        teacher, student = build_pair(folder, "llama", "llama", tied=tied, big={"shards": shards})
        assert len(list(teacher.glob("*.safetensors"))) == 1 if shards is None else 4
        seeds = write_seeds(folder / "seeds.jsonl")
        made = pkt.extract(str(teacher), str(student), seeds, folder / "out", rank=RANK)
        results.append(made)
    assert factors_of(results[0].folder) == factors_of(results[1].folder)
    for key in ("loss", "layer_scores", "layers", "windows"):
        assert results[0].manifest[key] == results[1].manifest[key]
    hashes = [made.manifest["teacher"]["headers_sha256"] for made in results]
    assert hashes[0] != hashes[1]
    made, wanted, _ = run_both(several, teacher, student)
    compare(made, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_element_types_in_float32_equal_full_autograd(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """The reference takes the same stored values in float64."""
    teacher, student = build_pair(tmp_path, "llama", "llama", big={"dtype": dtype})
    wide = {} if dtype == torch.float64 else {"dtype": "float32"}  # float64: auto is float32
    made, wanted, _ = run_both(tmp_path, teacher, student, **wide)
    assert made.manifest["options"]["dtype"] == "F32"
    compare(made, wanted)


@pytest.mark.parametrize("select", ["window", "top-weights"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_without_scales_equals_full_autograd(
    dtype: torch.dtype, select: str, tmp_path: Path
) -> None:
    teacher, student = build_pair(tmp_path, "phi3", "phi3")

    def narrow(tensors: Tensors) -> Tensors:
        return {n: t.to(dtype) if t.ndim == 2 else t for n, t in tensors.items()}

    rewrite(teacher, narrow)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", select=select)
    compare(made, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bfloat16_is_near_full_autograd(dtype: torch.dtype, tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama", big={"dtype": dtype})
    wanted_dtype = "auto" if dtype == torch.bfloat16 else "bfloat16"
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype=wanted_dtype)
    assert made.manifest["options"]["dtype"] == "BF16"
    compare_loosely(made, wanted, teacher, rtol=0.05)


def test_float16_under_auto_is_computed_in_float32(tmp_path: Path) -> None:
    """Its gradients underflow, and bfloat16 would round its weights."""
    teacher, student = build_pair(tmp_path, "llama", "llama", big={"dtype": torch.float16})
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    made = pkt.extract(str(teacher), str(student), seeds, tmp_path / "out", rank=RANK)
    assert made.manifest["options"]["dtype"] == "F32"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_a_bare_base_model_lacks_the_prefix(family: str, tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, family, family, tied=True)
    prefix = {"gpt_neox": "gpt_neox."}.get(family, "model.")

    def bare(tensors: Tensors) -> Tensors:
        return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

    rewrite(teacher, bare)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", embeddings=True)
    compare(made, wanted)


def test_stored_rotary_buffers_are_left_alone(tmp_path: Path) -> None:
    """LLaMA-1 checkpoints hold them; here they are wrong, so using them would show."""
    teacher, student = build_pair(tmp_path, "llama", "llama")

    def with_buffers(tensors: Tensors) -> Tensors:
        wrong = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}
        return {**tensors, **wrong}

    rewrite(teacher, with_buffers)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32")
    compare(made, wanted)


@pytest.mark.parametrize("same", [True, False], ids=["equal", "unequal"])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_tied_model_may_store_its_head_too(family: str, same: bool, tmp_path: Path) -> None:
    """By transformers' rule they are one tensor where their values agree, and two otherwise."""
    teacher, student = build_pair(tmp_path, family, family, tied=True)

    def with_head(tensors: Tensors) -> Tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = embedding.clone() if same else embedding.flip(0).clone()
        return {**tensors, "lm_head.weight": head}

    rewrite(teacher, with_head)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", embeddings=True)
    compare(made, wanted)


def test_a_weight_of_another_shape_than_the_configuration_says(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "intermediate_size": 81}))
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    with pytest.raises(CheckpointError) as caught:
        pkt.extract(str(teacher), str(student), seeds, tmp_path / "out", rank=RANK)
    text = str(caught.value)
    assert "model.layers.0.mlp." in text
    assert "model.safetensors" in text
    assert "(81, 48)" in text or "(48, 81)" in text
    assert "(80, 48)" in text or "(48, 80)" in text


def test_a_layer_without_a_tensor_it_needs(tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, "llama", "llama")
    gone = "model.layers.2.input_layernorm.weight"
    rewrite(teacher, lambda tensors: {n: t for n, t in tensors.items() if n != gone})
    seeds = write_seeds(tmp_path / "seeds.jsonl")
    with pytest.raises(CheckpointError, match=r"layer 2 has no tensor 'input_layernorm.weight'"):
        pkt.extract(str(teacher), str(student), seeds, tmp_path / "out", rank=RANK)
