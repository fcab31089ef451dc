"""`pkt train` as a user meets it: what it prints and writes, refuses, survives and continues."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

import tiny
from commands import Inputs, build_inputs, pkt, write_seeds
from pkt.durable import write_record
from pkt.training.checkpoints import COMPLETE, mark_complete, newest_complete
from runs import Nursery, contents

QUICK = ("--max-steps", 6, "--batch-size", 4, "--micro-batch", 2, "--lr", "1e-2",
         "--no-gradient-checkpointing", "-q")  # fmt: skip


class Bench:
    """A pair, its start and its data."""

    def __init__(self, folder: Path) -> None:
        self.inputs: Inputs = build_inputs(folder, seeds=12)
        self.start = folder / "start"
        made = pkt("extract", *self.inputs.options(), "--rank", 4, "-o", self.start, "-q")
        assert made.code == 0, made.err
        self.data = self.inputs.seeds

    def train(self, out: Path, *more: object, **replaced: object):
        given = {"student": self.inputs.student, "init": self.start, "data": self.data} | replaced
        words = [word for name, value in given.items() for word in (f"--{name}", value)]
        return pkt("train", *words, "-o", out, *QUICK, *more)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("train"))


def test_writes_what_it_says(bench, tmp_path):
    out = tmp_path / "out"
    made = bench.train(out, "--eval-data", bench.data, "--eval-steps", 3)
    assert made.code == 0, made.err
    assert made.out.strip() == str(out)
    names = {path.name for path in out.iterdir()}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "report",
        "metrics.jsonl", "pkt_manifest.json", "pkt_run.json",
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    manifest = json.loads((out / "pkt_manifest.json").read_text())
    assert manifest["step_zero"]["difference"] <= 1e-5
    assert manifest["eval_loss"]["student"] == rows[0]["eval_loss"]
    assert manifest["eval_loss"]["tuned"] < manifest["eval_loss"]["student"]
    page = (out / "report" / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert "rank" in (out / "README.md").read_text()
    again = bench.train(out, "--eval-data", bench.data, "--eval-steps", 3)
    assert again.code == 0
    assert contents(out)


def test_plan_and_sample(bench, tmp_path):
    shown = pkt("train", "--student", bench.inputs.student, "--data", bench.data, "--show-sample")
    assert shown.code == 0
    assert "⟦" in shown.out
    plan = pkt(
        "train", "--student", bench.inputs.student, "--data", bench.data, "--dry-run", "--json"
    )
    assert json.loads(plan.out)["start"]["init"] == "lora"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moments", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_at_random_moments_ends_with_the_same_bytes(moments, bench, tmp_path):
    paths = (bench.inputs.student, bench.data)
    options = {  # 12 examples: a checkpoint and a held-out loss at the end of every epoch
        "init": str(bench.start), "max_steps": 60, "batch_size": 4, "micro_batch": 2, "lr": 1e-2,
        "gradient_checkpointing": False, "save_steps": 3, "eval_data": str(bench.data),
        "dropout": 0.1,
    }  # fmt: skip
    draw = random.Random(moments)
    with Nursery() as nursery:
        began = time.monotonic()
        code, text = nursery.run(*paths, tmp_path / "whole", call="train", **options)
        assert code == 0, text
        length = time.monotonic() - began
        kills = 0
        out = tmp_path / "killed"
        while not (out / "pkt_manifest.json").exists():
            process = nursery.start(*paths, out, call="train", **options)
            if kills < moments:
                time.sleep(draw.uniform(0.2, 0.8) * length)
                with contextlib.suppress(ProcessLookupError):  # it was done
                    os.kill(process, signal.SIGKILL)
            code, text = nursery.finish()
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), text
    assert kills
    assert contents(out) == contents(tmp_path / "whole")


def test_ended_between_the_last_step_and_the_export(bench, tmp_path):
    # 12 examples in batches of 4: 7 steps end within an epoch, where the Trainer would go on.
    words = ("--max-steps", 7, "--save-steps", 1, "--eval-data", bench.data)
    assert bench.train(tmp_path / "whole", *words).code == 0
    with mock.patch("pkt.methods.tuning.write_tuned", side_effect=KeyboardInterrupt):
        assert bench.train(tmp_path / "out", *words).code != 0
    assert bench.train(tmp_path / "out", *words).code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_sigterm_keeps_the_step_and_says_how_to_continue(bench, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "pkt", "train", "--student", str(bench.inputs.student), "--init",
        str(bench.start), "--data", str(bench.data), "-o", str(out), "--max-steps", "100000",
        "--batch-size", "2", "--no-gradient-checkpointing",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "step     1/" not in (line := process.stderr.readline()):
        assert line, "it ended before its first step"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "continue with: pkt train --student" in err
    assert newest_complete(out / ".work" / "checkpoints")


def test_accelerate_on_two_processes_learns_what_one_does(bench, tmp_path):
    words = [
        "--student", bench.inputs.student, "--init", bench.start, "--data", bench.data, *QUICK,
        "--dropout", 0, "--eval-data", bench.data,
    ]  # fmt: skip
    assert pkt("train", *words, "-o", tmp_path / "one").code == 0
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
        "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "-m", "pkt", "train", *words, "--device", "cpu", "-o", tmp_path / "two",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "two")  # one process speaks
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for name in ("loss", "eval_loss"):
        ours, theirs = ([row[name] for row in rows if name in row] for rows in (one, two))
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert json.loads((tmp_path / "two" / "pkt_manifest.json").read_text())["processes"] == 2


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_costs_nothing(bench, tmp_path):
    out = tmp_path / "out"
    words = [
        "--student", bench.inputs.student, "--init", bench.start, "--data", bench.data, *QUICK,
        "--save-steps", 2, "-o", out,
    ]  # fmt: skip
    command = shlex.join([sys.executable, "-m", "pkt", "train", *map(str, words)])
    limited = ["bash", "-c", f"ulimit -f 10; exec {command}"]  # no file over 10 KiB
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "a checkpoint cannot be written" in done.stderr
    assert "continues from the one before" in done.stderr
    assert pkt("train", *words).code == 0
    assert bench.train(tmp_path / "whole", "--save-steps", 2).code == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_checkpoints_that_are_not_whole_are_passed_over(tmp_path):
    for step in (4, 8, 12, 16):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"state" * step)
        if step < 16:
            mark_complete(folder)
    (tmp_path / "checkpoint-12" / "optimizer.pt").write_bytes(b"flipped")
    (tmp_path / "checkpoint-8" / COMPLETE).write_text("{")
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-4"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_mixed_precision_ends_with_training(bench, tmp_path):
    made = bench.train(tmp_path / "out", "--autocast", "--eval-data", bench.data)
    assert made.code == 0, made.err
    manifest = json.loads((tmp_path / "out" / "pkt_manifest.json").read_text())
    assert manifest["export"]["difference"] <= manifest["export"]["bound"]


def test_another_students_start_is_refused(bench, tmp_path):
    other = tmp_path / "other"
    tiny.build("llama", other, "student", vocab=128, seed=2, hidden=24)
    tiny.write_tokenizer(other, 128)
    made = bench.train(tmp_path / "out", student=other)
    assert made.code == 3
    assert "extracted for another student" in made.error


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\0" * 100), "cannot be read"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "found no"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "pkt_manifest.json").write_text("[]"), "damaged"),
    ],
)
def test_a_damaged_start_is_refused(bench, tmp_path, damage, words):
    folder = tmp_path / "start"
    shutil.copytree(bench.start, folder)
    damage(folder)
    made = bench.train(tmp_path / "out", init=folder)
    assert made.code == 1
    assert words in made.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "code", "words"),
    [
        ([{"text": ""}], 5, "'text' is empty"),
        ([{"prompt": "a", "completion": ""}], 5, "its answer is empty"),
        ([{"question": "a"}], 5, "unknown columns"),
        ([{"question": "a " * 40, "answer": "b"}] * 2, 5, "no token left in the loss"),
    ],
)
def test_data_without_an_answer_is_refused(bench, tmp_path, rows, code, words):
    data = write_seeds(tmp_path / "data.jsonl", rows)
    made = bench.train(tmp_path / "out", "--max-tokens", 16, data=data)
    assert made.code == code
    assert words in made.error
    assert "data.jsonl" in made.error


def test_a_few_rows_without_an_answer_are_left_out_and_counted(bench, tmp_path):
    rows = [{"question": "a", "answer": "b"}] * 39 + [{"question": "a " * 40, "answer": "b"}]
    data = write_seeds(tmp_path / "data.jsonl", rows)
    made = bench.train(tmp_path / "out", "--max-tokens", 32, data=data)
    assert made.code == 0, made.err
    manifest = json.loads((tmp_path / "out" / "pkt_manifest.json").read_text())
    assert manifest["data"]["left_out"] == 1
    assert manifest["data"]["count"] == 39


def test_changed_options_are_named(bench, tmp_path):
    out = tmp_path / "out"
    assert bench.train(out).code == 0
    changed = bench.train(out, "--lr", "2e-2")
    assert changed.code == 1
    assert "found README.md" in changed.error
    work = out / ".work"
    work.mkdir()
    identity = json.loads((out / "pkt_manifest.json").read_text())
    found = ("steps", "loss", "eval_loss", "step_zero", "export", "rank")
    state = {k: v for k, v in identity.items() if k not in found} | {"device": "cpu"}
    write_record(work / "run.json", state)
    for path in out.iterdir():
        if path != work:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    changed = bench.train(out, "--lr", "2e-2", "--warmup", "0.5")
    assert changed.code == 1
    assert "changed: options.lr, options.warmup" in changed.error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--init", "lora", "--start", "a-only"), "takes no --start"),
        (("--start", "scaled:-1"), "expected residual, a-only or scaled:c"),
        (("--eval-steps", "3"), "nothing is held out"),
        (("--init", "pissa", "--start", "a-only", "--norms-from", "x"), "norms of its own"),
        (("--start", "half"), "expected residual, a-only or scaled:c"),
        (("--rank", "64"), "has rank 4"),
        (("--targets", "q"), "the extraction says what is adapted"),
        (("--lr", "0"), "--lr: expected more than 0"),
        (("--warmup", "1.5"), "--warmup: expected a share"),
        (("--max-grad-norm", "0"), "--max-grad-norm: expected more than 0"),
        (("--init", "nowhere"), "expected lora, pissa, gaussian or a folder"),
        (("--norms-from", "nowhere"), "the extraction says what is adapted"),
        (("--init", "gaussian", "--norms-from", "nowhere"), "found no pkt_manifest.json"),
    ],
)
def test_usage(bench, tmp_path, options, words):
    made = bench.train(tmp_path / "out", *options)
    assert made.code == 2
    assert words in made.error
    assert not (tmp_path / "out").exists()


def test_diverged_training_says_so(bench, tmp_path):
    made = bench.train(tmp_path / "out", "--lr", "1e30")
    assert made.code == 1
    assert "loss is" in made.error
    assert "lower --lr" in made.hint


def test_student_larger_than_the_memory_is_refused(bench, tmp_path):
    made = bench.train(tmp_path / "out", "--max-ram", "10KB")
    assert made.code == 4
    assert "its weights alone hold" in made.error
