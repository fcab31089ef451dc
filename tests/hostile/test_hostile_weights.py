"""Damage that only reading or computing shows: one line that names it, and no result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import Inputs, build_inputs, pkt

Weights = dict[str, torch.Tensor]
Change = Callable[[Path], object]
Q = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return build_inputs(tmp_path_factory.mktemp("inputs"), seeds=1)


def weights(change: Callable[[Weights], object]) -> Change:
    """The weights are changed."""

    def rewrite(model: Path) -> None:
        held = load_file(model / "model.safetensors")
        change(held)
        save_file(held, model / "model.safetensors", {"format": "pt"})

    return rewrite


def spoiled(name: str, value: float) -> Change:
    """One number of a tensor is this; of an embedding, one of every row."""

    def spoil(held: Weights) -> None:
        held[name].view(len(held[name]), -1)[:, 0 if "embed" in name else -1] = value

    return weights(spoil)


def config(**entries: Any) -> Change:
    """config.json says this."""

    def rewrite(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return rewrite


def instead(name: str, make: Change) -> Change:
    """Something else in place of a file."""

    def replace(model: Path) -> None:
        (model / name).unlink()
        make(model / name)

    return replace


#: Name, what is done to the teacher, what the line says, the code.
CASES: list[tuple[str, Change, str, int]] = [
    ("a NaN in a layer", spoiled(Q, float("nan")), f"tensor '{Q}' in model.safetensors: expected finite weights", 1),
    ("an infinity in a layer", spoiled(Q, float("inf")), "expected finite weights, found inf", 1),
    ("minus infinity in a norm", spoiled("model.layers.0.input_layernorm.weight", -float("inf")), "found -inf", 1),
    ("a NaN in every row of the embedding", spoiled("model.embed_tokens.weight", float("nan")), "'model.embed_tokens.weight'", 1),
    ("a NaN in the head", spoiled("lm_head.weight", float("nan")), "'lm_head.weight'", 1),
    ("a NaN in the last norm", spoiled("model.norm.weight", float("nan")), "'model.norm.weight'", 1),
    ("a layer without its norm", weights(lambda w: w.pop("model.layers.3.input_layernorm.weight")), "layer 3 has no tensor 'input_layernorm.weight'", 1),
    ("no last norm", weights(lambda w: w.pop("model.norm.weight")), "no tensor for the parameter 'model.norm.weight'", 1),
    ("a norm of another length", weights(lambda w: w.update({"model.norm.weight": torch.ones(47)})), "expected shape (48,) from config.json, found (47,)", 1),
    ("a norm that is a scalar", weights(lambda w: w.update({"model.norm.weight": torch.ones(())})), "found ()", 1),
    ("a norm without elements", weights(lambda w: w.update({"model.norm.weight": torch.ones(0)})), "found (0,)", 1),
    ("another width in the config", config(hidden_size=36), "from config.json, found", 1),
    ("another MLP in the config", config(intermediate_size=81), "expected shape", 1),
    ("another vocabulary in the config", config(vocab_size=127), "expected shape", 1),
    ("heads that do not divide the width", config(num_attention_heads=5, num_key_value_heads=5), "transformers cannot build this model", 3),
    ("a width in words", config(hidden_size="wide"), "transformers cannot build this model", 3),
    ("an activation that nobody knows", config(hidden_act="evil"), "transformers cannot build this model", 3),
    ("a kind of model with code of its own", config(model_type="evil", auto_map={"AutoConfig": "evil.Config"}), "transformers cannot build this model", 3),
    ("a tokenizer that is a pipe", instead("tokenizer.json", os.mkfifo), "tokenizer.json: expected a regular file, found a pipe", 1),
    ("a tokenizer that never ends", instead("tokenizer.json", lambda path: path.symlink_to("/dev/zero")), "found a device", 1),
    ("a tokenizer that is no JSON", instead("tokenizer.json", lambda path: path.write_bytes(b"\xff{")), "its tokenizer cannot be loaded", 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "said", "code"), CASES, ids=[row[0] for row in CASES])
def test_a_teacher_that_cannot_be_read(
    name: str, change: Change, said: str, code: int, inputs: Inputs, tmp_path: Path
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(inputs.teacher, teacher)
    evil = tmp_path / "ran"
    (teacher / "evil.py").write_text(f"open({str(evil)!r}, 'w')")
    change(teacher)
    few = ("--limit", 1, "--rank", 2, "--targets", "q")
    ended = pkt("extract", *inputs.options(teacher=teacher), "-o", out, *few)
    assert ended.code == code, ended.err
    assert said in ended.error
    assert "Traceback" not in ended.err
    assert "bug in pkt" not in ended.err
    assert not evil.exists()
    assert not out.exists() or [path.name for path in out.iterdir()] == [".work"]


def test_a_student_whose_config_transformers_refuses(inputs: Inputs, tmp_path: Path) -> None:
    student, out = tmp_path / "student", tmp_path / "out"
    shutil.copytree(inputs.student, student)
    config(hidden_size="wide")(student)
    ended = pkt("extract", *inputs.options(student=student), "-o", out, "--targets", "q")
    assert ended.code == 3, ended.err
    assert "transformers cannot build this model" in ended.error
    assert "bug in pkt" not in ended.err
