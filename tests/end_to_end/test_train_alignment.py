"""Runs that learn from activations, and LoRA on chosen layers, as a user meets them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pkt as package
import tiny
from commands import Inputs, build_inputs, pkt, write_seeds
from pkt.adapter import read_factors
from pkt.api import prepare_training
from pkt.errors import DataError, IncompatibleError, PktError, UsageError
from runs import contents

QUICK: dict[str, Any] = {
    "batch_size": 4, "micro_batch": 2, "lr": 1e-2, "gradient_checkpointing": False,
    "dropout": 0.0, "warmup": 0.0,
}  # fmt: skip
#: `pkt.train` with what the first argument, a JSON object, says.
RUN = """
import json, sys, torch, pkt
given = json.loads(sys.argv[1])
torch.set_num_threads(1)
pkt.train(*given.pop("paths"), **given)
"""
OBJECTIVES = {"v1": "mlp", "v2": "span", "acl": "hidden", "hidden-mse": "hidden"}


class Bench:
    """A pair, its data, and for each interface targets with states for layers 1 and 3."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs: Inputs = build_inputs(folder)
        rows = [{"question": f"is tag {i}", "answer": f"dog and kid {i * i}"} for i in range(12)]
        self.data = write_seeds(folder / "data.jsonl", rows)
        for interface in ("mlp", "span", "hidden"):
            self.write(folder / interface, "1:1,4:3", interface=interface)

    def write(self, out: Path, pairs: str, student: Path | None = None, **more: Any) -> Path:
        package.write_targets(
            str(self.inputs.teacher), str(student or self.inputs.student), self.data, out,
            top_k=16, states=True, pairs=pairs, **more,
        )  # fmt: skip
        return out

    def given(self, objective: str, **options: Any) -> dict[str, Any]:
        said = self.folder / OBJECTIVES[objective]
        return {"objective": objective, "teacher_targets": said, **QUICK, **options}

    def train(self, out: Path, objective: str, **options: Any) -> package.records.Tuning:
        given = self.given(objective, **{"max_steps": 6, **options})
        return package.train(str(self.inputs.student), self.data, out, **given)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("alignment"))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_trains_the_paired_layers_and_says_so(
    bench: Bench, objective: str, tmp_path: Path
) -> None:
    made = bench.train(tmp_path / "out", objective, eval_data=bench.data)
    options, targets = made.manifest["options"], made.manifest["targets"]
    assert options["objective"] == objective
    assert options["layers"] == [1, 3]
    assert options["targets"] == ["up", "down", "v", "o"]
    assert options["epochs"] == 5
    assert targets["pairs"] == [[1, 1, 0], [4, 3, 0]]
    assert targets["interface"] == OBJECTIVES[objective]
    factors = read_factors(tmp_path / "out")
    assert len(factors) == 2 * 4
    assert {name.split(".")[2] for name in factors} == {"0", "2"}
    assert all(float(half.b.abs().max()) > 0 for half in factors.values())
    rows = [row for row in made.metrics if "loss" in row]
    for row in rows:
        parts = row.get("layer_loss", 0.0) + row.get("output_loss", 0.0)
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    if objective in ("v2", "acl"):
        assert [row["layer"] for row in rows] == [1, 1, 1, 3, 3, 3]
        assert [row["learning_rate"] for row in rows[:3]] == pytest.approx(
            [row["learning_rate"] for row in rows[3:]]
        )
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert objective in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"({objective})" in card
    again = bench.train(tmp_path / "out", objective, eval_data=bench.data)
    assert again.manifest == made.manifest


def test_default_output_losses(bench: Bench) -> None:
    def chosen(objective: str, **options: Any) -> Any:
        given = bench.given(objective, **options)
        task = prepare_training(str(bench.inputs.student), bench.data, **given)
        return {k: v for k, v in (task.config.alignment or {}).items() if k != "objective"}

    assert chosen("v1") == {"output_loss": "cosine"}
    assert chosen("v1", output_loss="kl", kl_weight=0.5) == {"output_loss": "kl", "kl_weight": 0.5}
    assert chosen("hidden-mse") == {"output_loss": "ce"}
    assert chosen("v2") == {"kl_weight": 1.0}
    assert chosen("v2", kl_weight=0) == {"kl_weight": 0}
    assert chosen("acl") == {}


@pytest.mark.parametrize(
    "objective",
    ["v2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v1", "acl"))],
)
@pytest.mark.slow
def test_killed_and_continued_ends_with_the_same_bytes(
    bench: Bench, objective: str, tmp_path: Path
) -> None:
    """Killed with SIGKILL once a checkpoint is there, in the first stage and in the second."""
    given = bench.given(objective, max_steps=12, save_steps=1, dropout=0.1)
    given["teacher_targets"] = str(given["teacher_targets"])
    package.train(str(bench.inputs.student), bench.data, tmp_path / "whole", **given)
    out = tmp_path / "killed"
    words = {**given, "paths": [str(bench.inputs.student), str(bench.data), str(out)]}
    for step in (2, 8):
        command = [sys.executable, "-c", RUN, json.dumps(words)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        mark = out / ".work" / "checkpoints" / f"checkpoint-{step}" / "complete.json"
        while not mark.exists() and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err
        assert not (out / "pkt_manifest.json").exists()
    package.train(str(bench.inputs.student), bench.data, out, **given)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("steps", [[1, 4], pytest.param([2, 3, 5], marks=pytest.mark.slow)])
def test_stopped_after_any_step_ends_with_the_same_bytes(
    steps: list[int], bench: Bench, tmp_path: Path
) -> None:
    bench.train(tmp_path / "whole", "v2")
    for step in steps:
        out, done = tmp_path / f"{step}", [0]

        def count(phase: str, at: int, total: int, metrics: Any, done: list[int] = done) -> None:
            done[0] = at

        with pytest.raises(KeyboardInterrupt):
            bench.train(
                out, "v2", notify=count, stop=lambda step=step, done=done: done[0] >= step - 1
            )
        bench.train(out, "v2")
        assert contents(out) == contents(tmp_path / "whole")


def test_exported_and_evaluated(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.train(out, "v2")
    words = ("export", "--run", out, "--to", "merged", "-o", tmp_path / "merged", "-q")
    served = pkt(*words)
    assert served.code == 0, served.err
    scored = pkt(
        "eval", "--model", bench.inputs.student, "--adapter", out, "--model", tmp_path / "merged",
        "--tasks", "loss", "--data", bench.data, "-o", tmp_path / "scores", "-q",
    )  # fmt: skip
    assert scored.code == 0, scored.err


@pytest.mark.slow
def test_two_processes_learn_what_one_does(bench: Bench, tmp_path: Path) -> None:
    given = bench.given("v1", max_steps=3, output_loss="kl")
    given["teacher_targets"] = str(given["teacher_targets"])
    one = package.train(str(bench.inputs.student), bench.data, tmp_path / "one", **given)
    paths = [str(bench.inputs.student), str(bench.data), str(tmp_path / "two")]
    words = {**given, "paths": paths, "processes": 2, "device": "cpu"}
    program = tmp_path / "run.py"
    program.write_text(RUN)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        str(program), json.dumps(words),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    for ours, theirs in zip(one.metrics, map(json.loads, lines), strict=True):
        for name in ("loss", "layer_loss", "output_loss"):
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4)


# LoRA on some layers, the control


def test_plain_lora_on_the_same_layers_and_modules(bench: Bench, tmp_path: Path) -> None:
    aligned = bench.train(tmp_path / "aligned", "v1")
    words = ("train", "--student", bench.inputs.student, "--data", bench.data, "--layers", "3,1",
             "--targets", "up,down,v,o", "--max-steps", 2, "--batch-size", 4,
             "--no-gradient-checkpointing")  # fmt: skip
    made = pkt(*words, "-o", tmp_path / "plain")
    assert made.code == 0, made.err
    assert "layers 1, 3" in made.err
    ours, theirs = (read_factors(tmp_path / name) for name in ("aligned", "plain"))
    assert ours.keys() == theirs.keys()
    manifest = json.loads((tmp_path / "plain" / "pkt_manifest.json").read_text())
    assert manifest["options"]["layers"] == [1, 3]
    record = json.loads((tmp_path / "plain" / "pkt_run.json").read_text())
    assert record["trainable_parameters"] == aligned.run["trainable_parameters"]
    for given, text in (("0", "--layers 0: expected 1 to 3"), ("4", "--layers 4: expected 1 to 3"),
                        ("a", "found 'a'"), ("", "found ''")):  # fmt: skip
        refused = pkt(*words, "--layers", given, "-o", tmp_path / "none")
        assert (refused.code, text in refused.error) == (2, True), refused.err


# Bad input


def test_options_that_do_not_go_together(bench: Bench, tmp_path: Path) -> None:
    def refused(text: str, objective: str = "v1", **options: Any) -> None:
        with pytest.raises(UsageError, match=text):
            prepare_training(
                str(bench.inputs.student), bench.data, **bench.given(objective, **options)
            )

    refused("from which teacher", teacher_targets=None)
    refused("not beside --distill", distill="topk-kl")
    refused("an objective trains the layers", layers="1")
    refused("an objective trains the layers", embeddings=True)
    refused("an extraction is of all layers", init=str(tmp_path))
    refused("--output-loss l2: expected one that v1 takes", output_loss="l2")
    refused("none: it has its own", "v2", output_loss="ce")
    refused("--kl-weight: v1 has no KL", kl_weight=2.0)
    refused("--kl-weight: acl has no KL", "acl", kl_weight=2.0)
    refused("--kl-weight -1: expected 0 or more", "v2", kl_weight=-1)
    refused("--kl-weight 0: expected more than 0", output_loss="kl", kl_weight=0)
    refused("expected one process, found 2", "v2", processes=2)
    refused("expected one process, found 2", "acl", processes=2)
    refused("found 1 steps", "v2", max_steps=1)
    for name in ("output_loss", "kl_weight"):
        with pytest.raises(UsageError, match="not used without --objective"):
            prepare_training(str(bench.inputs.student), bench.data, **{name: "kl"})
    with pytest.raises(UsageError, match="--objective v3: expected one of v1, v2, acl"):
        prepare_training(str(bench.inputs.student), bench.data, objective="v3")


def test_targets_that_do_not_fit_the_run(bench: Bench, tmp_path: Path) -> None:
    def refused(
        kind: type[PktError], text: str, objective: str = "v1", student: Path | None = None,
        data: Path = bench.data, **options: Any,
    ) -> None:  # fmt: skip
        given = bench.given(objective, **options)
        with pytest.raises(kind, match=text):
            prepare_training(str(student or bench.inputs.student), data, **given)

    alone = tmp_path / "alone"
    package.write_targets(
        str(bench.inputs.teacher), str(bench.inputs.student), bench.data, alone, top_k=16
    )
    refused(IncompatibleError, "found logits alone", teacher_targets=alone)
    refused(
        IncompatibleError, "needs activations of interface span, found 'hidden'", "v2",
        teacher_targets=bench.folder / "hidden",
    )  # fmt: skip
    for number, size in enumerate(({"layers": 4}, {"hidden": 48})):
        unlike = tiny.build("llama", tmp_path / f"student-{number}", "student", vocab=128, **size)
        tiny.write_tokenizer(unlike, 128)
        theirs = bench.write(tmp_path / f"said-{number}", "2:2", unlike, interface="mlp")
        refused(IncompatibleError, "mapped to another student", teacher_targets=theirs)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(bench.data.read_text().replace("dog", "pig", 1))
    refused(DataError, "the training data have changed since", data=changed)
    refused(UsageError, "expected a folder that pkt align wrote", teacher_targets=tmp_path)
    other = tiny.build("llama", tmp_path / "other", "student", vocab=128, intermediate=60)
    tiny.write_tokenizer(other, 128)
    refused(IncompatibleError, "mapped to another student", student=other)
