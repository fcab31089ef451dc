"""`pkt compare` as a user meets it: one small comparison, extended, interrupted, refused."""

from __future__ import annotations

import json
import shutil

import pytest

from commands import Inputs, build_inputs, pkt
from pkt.durable import write_record

QUICK = ("--rank", 2, "--steps", 2, "--batch-size", 2, "--lrs", "1e-3", "--repeats", 2, "-q")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    return build_inputs(tmp_path_factory.mktemp("compare"), seeds=12)


def compare(inputs: Inputs, out, *more: object):
    data = ("--data", inputs.seeds, "--eval-data", inputs.seeds)
    return pkt("compare", *inputs.options(), *data, "-o", out, *QUICK, *more)


def test_a_comparison_and_its_extension(inputs, tmp_path):
    out = tmp_path / "out"
    made = compare(inputs, out, "--arms", "lora,seeking")
    assert made.code == 0, made.err
    assert made.out.splitlines()[-1] == str(out)
    found = json.loads((out / "results.json").read_text())
    assert [row["arm"] for row in found["arms"]] == ["lora", "seeking"]
    assert found["reference"] == "lora"
    assert found["test_examples"] == found["validation_examples"] == 6
    counts = {row["trainable"] for row in found["arms"]}
    assert len(counts) == 1  # the same trained parameters in every arm
    for row in found["arms"]:
        assert len(row["test_by_repeat"]) == 2
        assert len(set(row["test_by_repeat"])) == 2  # a repeat is another seed
        assert len(row["validation_by_rate"]) >= 3
    assert "| seeking |" in (out / "results.md").read_text()
    assert {path.name for path in (out / "report").iterdir()} == {
        "arms.png", "rates.png", "index.html",
    }  # fmt: skip
    cells = {path.name: path.read_bytes() for path in (out / "details").iterdir()}

    again = compare(inputs, out, "--arms", "lora,seeking")
    assert again.code == 0
    assert again.out == made.out

    more = compare(inputs, out, "--arms", "lora,seeking,random-window,gaussian")
    assert more.code == 0, more.err
    extended = json.loads((out / "results.json").read_text())
    assert len(extended["arms"]) == 4
    for name, data in cells.items():
        assert (out / "details" / name).read_bytes() == data  # not trained again
    rows = {row["arm"]: row for row in extended["arms"]}
    assert rows["lora"]["test_by_repeat"] == found["arms"][0]["test_by_repeat"]


def test_an_interrupted_comparison_ends_the_same(inputs, tmp_path):
    whole = tmp_path / "whole"
    assert compare(inputs, whole, "--arms", "seeking-scaled").code == 0
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    work = out / ".work"
    (work / "cells").mkdir(parents=True)
    identity = json.loads((out / "pkt_manifest.json").read_text())
    shared = {k: v for k, v in identity.items() if k not in ("arms", "rates", "repeats")}
    write_record(work / "run.json", shared)
    for index, path in enumerate(sorted((out / "details").iterdir())):
        if index % 2:
            shutil.copy(path, work / "cells")
    for path in out.iterdir():
        if path != work:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert compare(inputs, out, "--arms", "seeking-scaled").code == 0
    for name in ("results.json", "results.md", "pkt_manifest.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_vary(inputs, tmp_path):
    made = compare(inputs, tmp_path / "out", "--vary", "rank", "--values", "1,2", "--json")
    assert made.code == 0, made.err
    rows = json.loads(made.out)["arms"]
    assert [row["arm"] for row in rows] == ["seeking rank=1", "seeking rank=2"]
    assert 2 * rows[0]["trainable"] == rows[1]["trainable"]
    made = compare(
        inputs, tmp_path / "two", "--vary", "examples", "--values", "4,8", "--arms", "lora"
    )
    assert made.code == 0, made.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--arms", "lora,nonsense"), "no arm 'nonsense'"),
        (("--vary", "split", "--arms", "lora"), "extracts nothing"),
        (("--values", "1,2"), "only with --vary"),
        (("--vary", "rank", "--arms", "lora,seeking"), "expected one arm"),
        (("--lrs", "fast"), "expected auto or numbers"),
        (("--lrs", "-1"), "expected rates above 0"),
    ],
)
def test_usage(inputs, tmp_path, words, text):
    made = compare(inputs, tmp_path / "out", *words)
    assert made.code == 2
    assert text in made.error
    assert not (tmp_path / "out").exists()


def test_other_data_in_the_same_folder_is_refused(inputs, tmp_path):
    out = tmp_path / "out"
    assert compare(inputs, out, "--arms", "lora").code == 0
    changed = compare(inputs, out, "--arms", "lora", "--max-examples", 3)
    assert changed.code == 1
    assert "expected an empty folder or this run's own" in changed.error


def test_arms_that_learn_from_the_teachers_logits(inputs, tmp_path):
    out = tmp_path / "out"
    made = compare(inputs, out, "--arms", "lora,kd,seeking+kd")
    assert made.code == 0, made.err
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())["arms"]}
    assert {name for name, row in rows.items() if row["knows_teacher"]} == {"kd", "seeking+kd"}
    assert len({row["trainable"] for row in rows.values()}) == 1
    assert len({tuple(row["test_by_repeat"]) for row in rows.values()}) == 3
    assert not (out / ".work").exists()
    varied = compare(
        inputs, tmp_path / "varied", "--arms", "kd", "--vary", "examples", "--values", "4,8"
    )
    assert varied.code == 0, varied.err
    refused = compare(inputs, tmp_path / "no", "--arms", "kd", "--vary", "split")
    assert refused.code == 2
    assert "extracts nothing" in refused.error


@pytest.mark.slow
def test_arms_that_learn_from_the_teachers_activations(inputs, tmp_path):
    out = tmp_path / "out"
    arms = "lora,semalign-v1,lora-as-v1,semalign-v2,semalign-acl,hidden-mse,lora-as-v2"
    arms += ",kd+semalign"
    made = compare(inputs, out, "--arms", arms, "--steps", 3, "--repeats", 1)
    assert made.code == 0, made.err
    rows = {row["arm"]: row for row in json.loads((out / "results.json").read_text())["arms"]}
    aware = {name for name, row in rows.items() if row["knows_teacher"]}
    told = {"semalign-v1", "semalign-v2", "semalign-acl", "hidden-mse", "kd+semalign"}
    assert aware == told
    trained = {name: row["trainable"] for name, row in rows.items()}
    assert trained["semalign-v1"] == trained["lora-as-v1"] < trained["lora-as-v2"]
    assert trained["semalign-v2"] == trained["lora-as-v2"] == trained["hidden-mse"]
    assert trained["lora-as-v2"] < trained["lora"] == trained["kd+semalign"]
    assert len({tuple(row["test_by_repeat"]) for row in rows.values()}) == len(rows)
    varied = compare(
        inputs, tmp_path / "varied", "--arms", "semalign-v1", "--vary", "map", "--values",
        "dual,random",
    )  # fmt: skip
    assert varied.code == 0, varied.err
    refused = compare(inputs, tmp_path / "no", "--arms", "kd", "--vary", "map")
    assert refused.code == 2
    assert "learns from no activations" in refused.error
