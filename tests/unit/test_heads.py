"""Which pairs have a coherent sub-network, told from headers alone, by name and number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import pkt, write_seeds
from pkt.heads import head_problems, heads_of, kv_splits, split_heads
from pkt.models import Model, open_model
from tiny import build


def pair(
    folder: Path, big: dict[str, Any], small: dict[str, Any], family: str = "llama"
) -> list[Model]:
    build(family, folder / "teacher", "teacher", **big)
    build(family, folder / "student", "student", **small)
    return [open_model(str(folder / name), {}) for name in ("teacher", "student")]


def configure(model: Path, **entries: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused(folder: Path, *options: str) -> list[str]:
    """What `inspect` says is wrong; `extract` says the first of it, and both exit with 3."""
    models = ["--teacher", str(folder / "teacher"), "--student", str(folder / "student")]
    chosen = [*models, "--select", "consistent", *options]
    shown = pkt("inspect", *chosen)
    assert shown.code == 3
    assert pkt("inspect", *models, *options).code == 0, "the other strategies take this pair"
    found = [
        line.removeprefix("problem: ") for line in shown.out.splitlines() if "problem: " in line
    ]
    seeds = write_seeds(folder / "seeds.jsonl", [{"text": "a bad dog can dig"}])
    for path in folder.glob("*/model.safetensors"):
        clear_data(path)
    run = pkt("extract", *chosen, "--seeds", str(seeds), "--output-dir", str(folder / "out"))
    assert run.code == 3
    assert found[0] in run.error
    assert "--select consistent" in run.hint
    assert not (folder / "out").exists()
    return found


def clear_data(path: Path) -> None:
    """NaN wherever a weight was: whoever reads one will say so."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))


@pytest.mark.parametrize(
    ("theirs", "ours", "splits", "groups"),
    [
        ((8, 2), (4, 2), 1, (2, 4)),
        ((8, 2), (2, 1), 1, (2, 4)),
        ((8, 2), (4, 4), 4, (8, 1)),
        ((8, 2), (3, 3), 4, (8, 1)),
        ((8, 2), (6, 3), 2, (4, 2)),
        ((12, 2), (6, 3), 3, (6, 2)),
        ((12, 2), (9, 3), 2, (4, 3)),
        ((12, 2), (12, 3), 1, (2, 6)),
        ((4, 4), (4, 4), 1, (4, 1)),
    ],
)
def test_groups_split_into_the_smallest_that_hold_the_student(
    theirs: tuple[int, int], ours: tuple[int, int], splits: int, groups: tuple[int, int],
    tmp_path: Path,
) -> None:  # fmt: skip
    big, small = (
        {"heads": heads, "kv_heads": kv, "head_dim": 4, "hidden": 72}
        for heads, kv in (theirs, ours)
    )
    models = pair(tmp_path, big, small)
    assert kv_splits(*models) == splits
    cut = split_heads(*models)
    assert (cut.groups, cut.size, cut.dim, cut.query) == (*groups, 4, theirs[0])
    fits = cut.groups >= ours[1] and cut.size >= ours[0] // ours[1]
    assert (head_problems(*models) == []) == fits


def test_inspect_shows_how_often_kv_heads_are_repeated(tmp_path: Path) -> None:
    """By heads, not by rows: 24 rows of the teacher's k would hold the student's 24."""
    big = {"heads": 8, "kv_heads": 2, "head_dim": 12, "hidden": 64}
    pair(tmp_path, big, {"heads": 6, "kv_heads": 3, "head_dim": 8, "hidden": 48})
    models = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student"]
    shown = pkt("inspect", *models, "--select", "consistent")
    assert shown.code == 0
    assert shown.out.count("of 48×64 (kv heads × 2)") == 2
    assert "kv heads ×" not in pkt("inspect", *models).out


def test_too_few_query_heads_a_group(tmp_path: Path) -> None:
    pair(tmp_path, {"heads": 6, "kv_heads": 6}, {"heads": 4, "kv_heads": 2})
    (problem,) = refused(tmp_path)
    assert "has 1 query heads a kv head, the student 2" in problem


def test_too_few_groups(tmp_path: Path) -> None:
    big = {"heads": 12, "kv_heads": 2, "hidden": 48}
    pair(tmp_path, big, {"heads": 9, "kv_heads": 3, "head_dim": 4, "hidden": 36})
    assert pkt("inspect", "--teacher", tmp_path / "teacher", "--student", tmp_path / "student",
               "--select", "consistent").code == 0  # fmt: skip
    big = {"heads": 4, "kv_heads": 4, "hidden": 48, "head_dim": 12}
    pair(tmp_path, big, {"heads": 6, "kv_heads": 6, "head_dim": 8, "hidden": 36})
    (problem,) = refused(tmp_path)
    assert "make 4 groups of 1 query heads, the student has 6 of 1" in problem


def test_larger_heads(tmp_path: Path) -> None:
    pair(tmp_path, {"heads": 6, "kv_heads": 3}, {"heads": 2, "kv_heads": 1, "hidden": 20})
    (problem,) = refused(tmp_path)
    assert "a head of the teacher has 8 dims, the student's 10" in problem


def test_shorter_heads_whose_pairs_are_not_known(tmp_path: Path) -> None:
    pair(tmp_path, {"head_dim": 12}, {"head_dim": 8})
    for name in ("teacher", "student"):
        configure(tmp_path / name, model_type="cohere")
    found = refused(tmp_path)
    assert "12 dims a head: which of them 'cohere' turns together is not known" in found[0]
    wanted = ["--targets", "v,o,gate"]  # nothing of these turns
    models = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student"]
    assert pkt("inspect", *models, "--select", "consistent", *wanted).code == 0


def test_shorter_heads_with_too_few_dims_that_turn(tmp_path: Path) -> None:
    models = pair(tmp_path, {"hidden": 96, "heads": 6}, {"heads": 4}, "gpt_neox")
    assert [heads_of(model).rotary for model in models] == [8, 4]
    assert head_problems(*models) == []
    for name, share in (("teacher", 0.125), ("student", 0.5)):
        rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
        configure(tmp_path / name, rope_parameters=rope)
    (problem,) = refused(tmp_path)
    assert "turns 2 of a head's 16 dims, the student 4 of 8" in problem


@pytest.mark.parametrize(
    ("entries", "share"),
    [
        ({"partial_rotary_factor": 0.5}, 0.5),
        ({"rotary_pct": 0.25}, 0.25),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.75}}, 0.75),
        ({"model_type": "gpt_neox", "rope_parameters": {}}, 0.25),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, 1.0),
        ({}, 1.0),
    ],
)
def test_the_share_that_turns(entries: dict[str, Any], share: float, tmp_path: Path) -> None:
    model = build("llama", tmp_path / "model", hidden=48, heads=6)
    path = model / "config.json"
    plain = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("rope")}
    path.write_text(json.dumps(plain | entries))
    assert heads_of(open_model(str(model), {})).rotary == 8 * share


def test_a_matrix_of_an_unknown_role(tmp_path: Path) -> None:
    pair(tmp_path, {"layers": 2}, {"layers": 2})
    for name, size in (("teacher", 48), ("student", 32)):
        path = tmp_path / name / "model.safetensors"
        extra = {f"model.layers.{i}.mlp.router.weight": torch.ones(4, size) for i in range(2)}
        save_file(load_file(path) | extra, path, {"format": "pt"})
    (problem,) = refused(tmp_path)
    assert problem.startswith("mlp.router: ")
    assert "--targets" in problem
    models = ["--teacher", tmp_path / "teacher", "--student", tmp_path / "student"]
    targets = ["--targets", "q,k,v,o,gate,up,down"]
    assert pkt("inspect", *models, "--select", "consistent", *targets).code == 0


def test_a_matrix_that_is_not_what_its_role_says(tmp_path: Path) -> None:
    """A query projection with gates in it has twice the rows of its heads."""
    pair(tmp_path, {}, {})
    path = tmp_path / "teacher" / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "q_proj" in name]:
        tensors[name] = torch.cat([tensors[name]] * 2)
    save_file(tensors, path, {"format": "pt"})
    (problem,) = refused(tmp_path)
    assert problem == (
        "self_attn.q_proj: --select consistent expects shape (48, 48) of the teacher's q "
        "projection, found (96, 48)"
    )
