"""The product against a full-autograd reference that holds the whole teacher in memory.

Law 1: layer scores within 1e-4 relative, windows equal or their sums within 1e-6 of each other,
σ_i and ‖W − BA‖_F within 1e-4, for every family, tied and untied, one file and several.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reference
import tiny
from pkt.api import execute, prepare
from pkt.records import Extraction, SampleSet

RANK = 4
WORDS = "a bat can dig each far gap his ink jar kit low map not old pan quiz run sit".split()  # noqa: SIM905


def write_seeds(path: Path, count: int = 5, seed: int = 0) -> Path:
    """Texts and questions of different lengths, all longer than the sliding window."""
    choose = random.Random(seed)
    rows: list[dict[str, str]] = []
    for index in range(count):
        words = [choose.choice(WORDS) for _ in range(6 + index)]
        if index % 2:
            rows.append({"question": " ".join(words[:4]), "answer": " ".join(words[4:])})
        else:
            rows.append({"text": " ".join(words)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build_pair(
    folder: Path,
    teacher: str,
    student: str,
    *,
    big: dict[str, Any] | None = None,
    small: dict[str, Any] | None = None,
    **both: Any,
) -> tuple[Path, Path]:
    """A teacher with a tokenizer, and a student of the same or another family."""
    paths = folder / "teacher", folder / "student"
    tiny.build(teacher, paths[0], "teacher", vocab=128, **{**both, **(big or {})})
    tiny.build(student, paths[1], "student", vocab=128, seed=1, **{**both, **(small or {})})
    for path in paths:
        tiny.write_tokenizer(path, 128)
    return paths


def run_both(
    folder: Path, teacher: Path, student: Path, **options: Any
) -> tuple[Extraction, dict[str, Any], SampleSet]:
    """Extract with pkt and with the reference from the same tokens."""
    seeds = write_seeds(folder / "seeds.jsonl")
    task = prepare(str(teacher), str(student), seeds, rank=RANK, **options)
    made = execute(task, folder / "out")
    tokens = [(list(seed.tokens), list(seed.loss_mask)) for seed in task.seeds.samples]
    wanted = reference.extract(
        teacher, student, tokens, RANK, options.get("split", "paper"),
        options.get("select", "window"), options.get("embeddings", False),
    )  # fmt: skip
    return made, wanted, task.seeds


def compare(made: Extraction, wanted: dict[str, Any]) -> None:
    """Every number that the manifest and the adapter hold."""
    manifest = made.manifest
    mean = sum(wanted["losses"]) / len(wanted["losses"])
    assert manifest["loss"] == pytest.approx(mean, rel=1e-4)
    assert manifest["layer_scores"] == pytest.approx(wanted["layer_scores"].tolist(), rel=1e-4)
    assert manifest["layers"] == wanted["layers"]
    compare_windows(manifest["windows"], wanted["modules"])
    tensors = load_file(made.folder / "adapter_model.safetensors")
    for name, module in wanted["modules"].items():
        compare_factors(name, module, tensors)
    assert len(tensors) == 2 * len(wanted["modules"])


def compare_windows(windows: dict[str, Any], modules: dict[str, Any]) -> None:
    found = set()
    for name, module in modules.items():
        for part, pick in module["parts"].items():
            leaf = part.rsplit(".", 1)[-1].removesuffix("_proj")
            key = name if name in windows else f"{name}#{leaf}"
            window = windows[key]
            found.add(key)
            assert window["kv_repeat"] == pick.repeat, key
            assert window["score"] == pytest.approx(float(pick.total), rel=1e-4), key
            shape = module["weight"].shape if key == name else None
            if isinstance(pick.at[0], int):
                row, column = pick.at
                starts = [window["rows"][0], window["cols"][0]]
                if starts != [row, column]:
                    sizes = [e - s for s, e in (window["rows"], window["cols"])]
                    theirs = reference.window_sum(pick.scores, *starts, *sizes)
                    assert float(theirs) == pytest.approx(float(pick.total), rel=1e-6), key
                elif shape is not None:
                    assert window["rows"] == [row, row + shape[0]], key
                    assert window["cols"] == [column, column + shape[1]], key
    assert found == set(windows)


def compare_factors(name: str, module: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    kind = "embedding_" if f"base_model.model.{name}.lora_embedding_A" in tensors else ""
    ending = "" if kind else ".weight"
    a = tensors[f"base_model.model.{name}.lora_{kind}A{ending}"].double()
    b = tensors[f"base_model.model.{name}.lora_{kind}B{ending}"].double()
    weight = module["weight"].double()
    weight = weight.T if kind else weight
    theirs = module["factors"]
    sigma = torch.linalg.svdvals(b @ a)[: len(theirs.sigma)]
    torch.testing.assert_close(sigma, theirs.sigma.double(), rtol=1e-4, atol=1e-6)
    residual = torch.linalg.norm(weight - b @ a)
    expected = torch.linalg.norm(weight - theirs.b.double() @ theirs.a.double())
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b @ a, theirs.b.double() @ theirs.a.double(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(a, theirs.a.double(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_equals_full_autograd(family: str, tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, family, family)
    made, wanted, seeds = run_both(tmp_path, teacher, student, dtype="float32")
    assert seeds.longest > tiny.WINDOW
    compare(made, wanted)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "gpt_neox"])
def test_embedding_and_head_equal_full_autograd(family: str, tied: bool, tmp_path: Path) -> None:
    """One tensor or two: the absolute value comes after both gradients are added."""
    teacher, student = build_pair(tmp_path, family, family, tied=tied)
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32", embeddings=True)
    compare(made, wanted)


def test_buffers_that_the_model_saves_are_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    """Gemma 4 scales each layer's output by a learned number, which it keeps in a buffer."""
    config = {
        "head_dim": 12,
        "global_head_dim": 12,
        "hidden_size_per_layer_input": 0,
        "sliding_window": tiny.WINDOW,
        "pattern": True,
        "pad_token_id": 0,
    }
    monkeypatch.setitem(tiny.FAMILIES, "gemma4", ("gemma4_text", config))
    teacher, student = build_pair(tmp_path, "gemma4", "gemma4")
    tensors = load_file(teacher / "model.safetensors")
    scales = [name for name in tensors if name.endswith("layer_scalar")]
    assert len(scales) == tiny.SIZES["teacher"][0]
    for name in scales:
        tensors[name] = torch.full_like(tensors[name], 0.6)
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    made, wanted, _ = run_both(tmp_path, teacher, student, dtype="float32")
    compare(made, wanted)
