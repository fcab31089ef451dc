"""`pkt inspect --align` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from commands import Inputs, build_inputs, pkt, result_bytes, write_seeds
from pkt.errors import OutputError
from tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    made = build_inputs(tmp_path_factory.mktemp("inputs"))
    rows = [{"text": f"What is the sum of {i} and {i * i}? The answer is {i}."} for i in range(4)]
    write_seeds(made.seeds, rows)
    return made


def align(inputs: Inputs, *more: object, **replaced: object) -> Any:
    return pkt("inspect", "--align", *inputs.options(**replaced), *more)


def test_the_report_says_map_and_why(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = align(inputs, "-o", out)
    assert shown.code == 0, shown.err
    assert "map: dual" in shown.out
    assert "it says nothing yet of a better student" in shown.out
    assert shown.out.rstrip().endswith(str(out / "report" / "index.html"))
    assert "at the peak" in shown.err, "the plan comes first"
    made = json.loads((out / "pkt_manifest.json").read_text())
    assert [(p["teacher"], p["student"]) for p in made["pairs"]] == [(1, 1), (2, 2), (4, 3)]
    for pair in made["pairs"]:
        assert f"{pair['teacher']}" in shown.out
    page = (out / "report" / "index.html").read_text()
    assert made["recommended"]["why"].split(";")[0] in page
    assert {p.name for p in out.iterdir()} == {
        "maps", "pkt_manifest.json", "pkt_run.json", "report",
    }  # fmt: skip
    with safe_open(out / "maps" / "dual.safetensors", "pt") as file:
        assert file.get_tensor("map").shape == (32, 48)
    before = result_bytes(out)
    again = align(inputs, "-o", out)
    assert (again.code, again.out) == (0, shown.out)
    assert result_bytes(out) == before
    other = tmp_path / "other"
    assert align(inputs, "-o", other, "--io", "buffered", "--max-ram", "2GiB").code == 0
    assert result_bytes(other) == before, "the same bytes, however it was read"
    refused = align(inputs, "-o", out, "--no-fold-norm")
    assert (refused.code, "found maps" in refused.error) == (1, True)
    replaced = align(inputs, "-o", out, "--no-fold-norm", "--overwrite")
    assert replaced.code == 0
    assert result_bytes(out) != before


def test_an_interrupted_report_uses_its_maps_again(inputs: Inputs, tmp_path: Path) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    where = ("-o", out, "--spool-dir", there)
    stopped = OutputError("the disk is full")
    with mock.patch("pkt.methods.semalign.quality.linear_cka", side_effect=stopped):
        assert align(inputs, *where).code == 1
    assert (out / ".work" / "maps" / "dual.safetensors").is_file()
    assert list(there.iterdir()), "hidden states of the interrupted run"
    assert align(inputs, *where).code == 0
    run = json.loads((out / "pkt_run.json").read_text())
    assert run["maps_reused"] == ["cosine", "dual", "embedding"]
    assert list(there.iterdir()) == []
    fresh = tmp_path / "fresh"
    assert align(inputs, "-o", fresh).code == 0
    assert result_bytes(out) == result_bytes(fresh)


def test_json_is_one_object_and_nothing_is_left(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = align(inputs, "--json", "-q", "--map", "dual,procrustes", "--spool-dir", "there")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    assert list(found["manifest"]["maps"]) == ["dual", "procrustes"]
    assert found["manifest"]["self_cosine"] is None, "v1's map was not asked for"
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_built_in_stories_are_the_default(inputs: Inputs) -> None:
    models = ("--teacher", inputs.teacher, "--student", inputs.student)
    shown = pkt("inspect", "--align", *models, "--limit", 2, "--max-tokens", 24, "--map", "dual")
    assert shown.code == 0, shown.err
    assert "positions of 2 texts" in shown.out


def test_a_model_beside_itself_loses_nothing(inputs: Inputs) -> None:
    found = json.loads(align(inputs, "--json", student=inputs.teacher).out)["manifest"]
    assert found["maps"]["dual"]["mean_cosine"] == pytest.approx(1, abs=1e-4)
    assert found["maps"]["dual"]["mean_top1"] == 1
    assert found["maps"]["cosine"]["mean_cosine"] < 0.999
    alike = torch.tensor(found["similarity"])
    assert alike.diagonal().tolist() == pytest.approx([1.0] * 4, abs=1e-5)


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (["--map", "duel"], 2, "--map duel: expected some of cosine, dual"),
        (["--rank", "4"], 2, "with --align has no --rank"),
        (["--max-ram", "100MiB"], 4, "--max-ram 100MiB allows 100.0 MiB"),
        (["--seeds", "nowhere.jsonl"], 5, "nowhere.jsonl"),
        (["--template", "chat"], 2, "no chat template"),
        (["--limit", "1", "--max-tokens", "4"], 5, "expected at least 8 places"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    inputs: Inputs, more: list[str], code: int, said: str
) -> None:
    ended = align(inputs, *more)
    assert ended.code == code, ended.err
    assert said in ended.error
    assert ended.out == ""


def test_options_of_align_need_it(inputs: Inputs) -> None:
    models = ("--teacher", inputs.teacher, "--student", inputs.student)
    for option in (["--map", "dual"], ["--no-fold-norm"], ["-o", "x"], ["--seeds", "x"]):
        ended = pkt("inspect", *models, *option)
        assert ended.code == 2
        assert "without --align" in ended.error
    ended = pkt("inspect", "--align", "--teacher", inputs.teacher)
    assert (ended.code, "--student" in ended.error) == (2, True)


def test_a_deeper_student_is_refused(inputs: Inputs) -> None:
    ended = align(inputs, teacher=inputs.student, student=inputs.teacher)
    assert (ended.code, "at least the student's 4, found 3" in ended.error) == (3, True)


def test_a_damaged_head_is_named(inputs: Inputs, tmp_path: Path) -> None:
    student = tiny.build("llama", tmp_path / "student", "student", vocab=128, seed=1)
    tiny.write_tokenizer(student, 128)
    weights = load_file(student / "model.safetensors")
    weights["lm_head.weight"][9, 3] = torch.inf
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    ended = align(inputs, student=student)
    assert ended.code == 1
    assert "'lm_head.weight' in model.safetensors" in ended.error
    assert "found inf at (9, 3)" in ended.error


def test_a_singular_head_is_told(inputs: Inputs, tmp_path: Path) -> None:
    student = tiny.build("llama", tmp_path / "student", "student", vocab=128, seed=1)
    tiny.write_tokenizer(student, 128)
    weights = load_file(student / "model.safetensors")
    weights["lm_head.weight"][:, 5] = 0
    weights["lm_head.weight"][20:30] = 0
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    shown = align(inputs, student=student)
    assert shown.code == 0, shown.err
    assert "singular" in shown.out
    assert "10 of them have a zero row and are left out" in shown.out
    assert "the head of the student is nearly singular: a ridge was added" in shown.out


def test_tokens_that_differ(inputs: Inputs, tmp_path: Path) -> None:
    """Another order of the same tokens is nothing; too few of the same are refused."""
    student = tiny.build("llama", tmp_path / "student", "student", vocab=160, seed=1)
    write_tokenizer(student, 120, bos=False)
    shown = align(inputs, student=student, seeds=inputs.seeds)
    assert shown.code == 0, shown.err
    assert "100.0% of the smaller vocabulary" in shown.out
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    kept = {"<pad>", "<s>", "</s>", "<unk>", *map(chr, range(33, 78))}
    tokenizer["model"]["vocab"] = {
        token if token in kept else f"qqq{token}": number for token, number in words.items()
    }
    tokenizer["model"]["merges"] = []
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = align(inputs, student=student)
    assert ended.code == 3
    assert "expected at least half of the smaller one" in ended.error
    assert "--allow-low-coverage" in ended.hint
