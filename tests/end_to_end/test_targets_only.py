"""`pkt align --targets-only` and `pkt train --distill` as a user meets them."""

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

import pytest
import torch
from transformers import AutoModelForCausalLM

import pkt as package
import tiny
from commands import Inputs, Result, build_inputs, pkt, write_seeds
from pkt.evaluation import agreement, mean_agreement
from pkt.targets import Targets
from runs import Nursery, contents

QUICK = ("--max-steps", 4, "--batch-size", 4, "--micro-batch", 2, "--lr", "1e-2",
         "--no-gradient-checkpointing", "-q")  # fmt: skip
DEMO = Path(package.__file__).parent / "data" / "demo"


class Bench:
    """A pair, its data, and targets of them."""

    def __init__(self, folder: Path) -> None:
        self.inputs: Inputs = build_inputs(folder)
        rows = [
            {"question": f"is tag {i} big", "answer": f"dog and kid {i * i}"} for i in range(12)
        ]
        self.data = write_seeds(folder / "data.jsonl", rows)
        self.said = folder / "said"
        self.made = self.align(self.said)
        assert self.made.code == 0, self.made.err

    def align(self, out: Path, *more: object, **replaced: object) -> Result:
        given = {
            "teacher": self.inputs.teacher, "student": self.inputs.student, "data": self.data,
            "top-k": 16,
        }  # fmt: skip
        words = [w for name, value in (given | replaced).items() for w in (f"--{name}", value)]
        return pkt("align", "--targets-only", *words, "-o", out, *more)

    def train(self, out: Path, *more: object, **replaced: object) -> Result:
        given = {
            "student": self.inputs.student, "data": self.data, "distill": "topk-kl",
            "teacher-targets": self.said,
        }  # fmt: skip
        words = [w for name, value in (given | replaced).items() for w in (f"--{name}", value)]
        return pkt("train", *words, "-o", out, *QUICK, *more)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("align"))


# pkt align


def test_what_it_prints_and_writes(bench: Bench) -> None:
    assert bench.made.out.strip() == str(bench.said)
    for words in ("examples", "plan", "to write", "the teacher, once", "forward", "targets",
                  "teacher's loss", "one bin", "at the peak"):  # fmt: skip
        assert words in bench.made.err
    names = {path.name for path in bench.said.iterdir()}
    assert names == {"targets", "pkt_manifest.json", "pkt_run.json"}
    again = bench.align(bench.said)
    assert again.code == 0
    assert "finished already" in again.err


def test_dry_run_and_json(bench: Bench, tmp_path: Path) -> None:
    words = ["--teacher", bench.inputs.teacher, "--student", bench.inputs.student]
    shown = pkt("align", "--targets-only", *words, "--data", bench.data, "--dry-run", "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert found["plan"]["passes"] == 1
    assert found["plan"]["fits"]
    assert found["options"]["top_k"] == 64
    made = bench.align(tmp_path / "out", "--json", "-q")
    assert made.err == ""
    assert json.loads(made.out)["manifest"]["data"]["count"] == 12


def test_states_are_planned_paired_and_told(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = bench.align(out, "--states", "--interface", "mlp", "--critical", 2)
    assert made.code == 0, made.err
    for words in ("what each MLP adds", "map dual", "2 highest lead to pairs", "twice for",
                  "backward", "teacher layer  student layer", "BF16 is off by", "paired with",
                  "report/index.html"):  # fmt: skip
        assert words in made.err, words
    held = Targets(out / "targets")
    assert held.interface == "mlp"
    assert 1 <= len(held.pairs) <= 2
    again = bench.align(out, "--states", "--interface", "mlp", "--critical", 2)
    assert "finished already" in again.err
    shown = bench.align(tmp_path / "dry", "--states", "--dry-run", "--interpolate")
    assert "mixed with the next" in shown.out
    found = json.loads(bench.align(tmp_path / "dry", "--states", "--dry-run", "--json").out)
    assert found["states"]["map"] == "dual"
    assert [pair["student"] for pair in found["pairs"]] == [1, 2, 3]
    assert not (tmp_path / "dry").exists()


def test_a_student_learns_logits_from_targets_with_states(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "said"
    assert bench.align(out, "--states", "-q", "--map", "truncate").code == 0
    made = bench.train(tmp_path / "tuned", **{"teacher-targets": out})
    assert made.code == 0, made.err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["align", "--targets-only"], 2, "also needs --teacher, --student, --data, -o"),
    ],
)  # fmt: skip
def test_incomplete_commands(words: list[str], code: int, text: str) -> None:
    made = pkt(*words)
    assert made.code == code
    assert text in made.error


def test_refusals_have_their_codes(bench: Bench, tmp_path: Path) -> None:
    other = tiny.build("llama", tmp_path / "other", "student", vocab=140)
    tiny.write_tokenizer(other, 140)
    for replaced, more, code, text in (
        ({"student": other}, (), 3, "two tokenizers differ"),
        ({"teacher": tmp_path / "none"}, (), 2, "no such folder"),
        ({"data": tmp_path / "none.jsonl"}, (), 5, "cannot be read"),
        ({}, ("--max-ram", "64MiB"), 4, "at its peak"),
        ({}, ("--pairs", "1:1"), 2, "--pairs: not used without --states"),
        ({}, ("--states", "--pairs", "7:1"), 2, "teacher layer 7: expected 1 to 4"),
        ({}, ("--states", "--map", "none"), 2, "'none' is not one of"),
        ({}, ("--states", "--device", "cuda"), 2, "--device cuda: not available here"),
    ):
        made = bench.align(tmp_path / "out", *more, **replaced)
        assert (made.code, text in made.error) == (code, True), made.err
        assert not (tmp_path / "out").exists()
    full = bench.align(bench.data / "out")
    assert full.code == 1


def test_sigterm_keeps_what_is_finished(bench: Bench, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    write_seeds(data, [{"text": f"tag {i} big dog and kid {i * i}"} for i in range(400)])
    command = [
        sys.executable, "-m", "pkt", "align", "--targets-only", "--teacher",
        str(bench.inputs.teacher), "--student", str(bench.inputs.student), "--data", str(data),
        "-o", str(out),
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while "forward  1/" not in (line := process.stderr.readline()):
        assert line, "it ended before its first layer"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 143, err
    assert "layers and 0 of 1 files of targets are finished" in err
    assert "continue with: pkt align --targets-only" in err
    assert pkt(*command[3:]).code == 0


# pkt train --distill


def test_a_distilled_run(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = bench.train(out, "--eval-data", bench.data)
    assert made.code == 0, made.err
    manifest = json.loads((out / "pkt_manifest.json").read_text())
    assert manifest["options"]["distill"] == "topk-kl"
    assert manifest["options"]["distill_weight"] == 1
    assert manifest["targets"]["top_k"] == 16
    said = json.loads((bench.said / "pkt_manifest.json").read_text())
    assert manifest["targets"]["teacher"] == said["teacher"]
    plan = bench.train(tmp_path / "dry", "--dry-run")
    assert "learns" in plan.out
    assert "16 largest logits" in plan.out


def test_labels_alone_leave_the_manifest_as_it_was(bench: Bench, tmp_path: Path) -> None:
    words = ["--student", bench.inputs.student, "--data", bench.data]
    found = json.loads(pkt("train", *words, "--dry-run", "--json").out)
    assert "targets" not in found
    assert "distill" not in found["options"]


def test_the_logged_loss_is_the_mean_over_answer_tokens(bench: Bench, tmp_path: Path) -> None:
    """Step 1 of a run of one whole batch: the student's own divergence, however it is divided."""
    losses = []
    for micro in (2, 4):
        out = tmp_path / f"{micro}"
        words = ("--batch-size", 12, "--micro-batch", micro, "--max-steps", 1, "--dropout", 0)
        assert bench.train(out, *words).code == 0
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        losses.append(row["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    everything = bench.align(tmp_path / "all", "-q", **{"top-k": 0})
    assert everything.code == 0, everything.err
    made = bench.train(
        tmp_path / "full", "--batch-size", 12, "--max-steps", 1, "--dropout", 0,
        **{"distill": "kl", "teacher-targets": tmp_path / "all"},
    )  # fmt: skip
    assert made.code == 0, made.err
    row = json.loads((tmp_path / "full" / "metrics.jsonl").read_text().splitlines()[0])
    task = package.api.prepare_training(str(bench.inputs.student), bench.data)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (bench.inputs.student, bench.inputs.teacher)
    ]
    wanted = mean_agreement(agreement(*models, task.samples.samples)).kl
    assert row["loss"] == pytest.approx(wanted, rel=1e-4)
    assert losses[0] <= row["loss"] * (1 + 1e-5)  # fewer bins say less


@pytest.mark.parametrize("moments", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_killed_and_continued_ends_with_the_same_bytes(
    moments: int, bench: Bench, tmp_path: Path
) -> None:
    options = {
        "distill": "topk-kl", "teacher_targets": str(bench.said), "distill_weight": 0.7,
        "max_steps": 24, "batch_size": 4, "micro_batch": 2, "lr": 1e-2, "dropout": 0.1,
        "gradient_checkpointing": False, "save_steps": 3,
    }  # fmt: skip
    paths, draw = (bench.inputs.student, bench.data), random.Random(moments)
    with Nursery() as nursery:
        began = time.monotonic()
        code, text = nursery.run(*paths, tmp_path / "whole", call="train", **options)
        assert code == 0, text
        length, kills, out = time.monotonic() - began, 0, tmp_path / "killed"
        while not (out / "pkt_manifest.json").exists():
            process = nursery.start(*paths, out, call="train", **options)
            if kills < moments:
                time.sleep(draw.uniform(0.3, 0.8) * length)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            code, text = nursery.finish()
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), text
    assert kills
    assert contents(out) == contents(tmp_path / "whole")


def test_targets_that_do_not_fit_the_run(bench: Bench, tmp_path: Path) -> None:
    def refused(code: int, text: str, *more: object, **replaced: object) -> None:
        made = bench.train(tmp_path / "out", *more, **replaced)
        assert (made.code, text in made.error) == (code, True), made.err
        assert not (tmp_path / "out").exists()

    changed = tmp_path / "changed.jsonl"
    changed.write_text(bench.data.read_text().replace("dog", "pig", 1))
    refused(5, "the training data have changed since", data=changed)
    refused(5, "--max-tokens was 2048, is 40", "--max-tokens", 40)
    refused(5, "--max-examples was 1000, is 3", "--max-examples", 3)
    refused(5, "--template was paper, is none", "--template", "none")
    refused(2, "expected a folder that pkt align wrote", **{"teacher-targets": tmp_path})
    refused(2, "the 16 largest in", distill="kl")
    refused(2, "more than 0, at most 1", "--distill-weight", 0)
    refused(2, "more than 0, at most 1", "--distill-weight", 1.5)
    other = tiny.build("llama", tmp_path / "other", "student", vocab=140)
    tiny.write_tokenizer(other, 140)
    refused(3, "another tokenizer than that of", student=other)
    trained = tmp_path / "trained"
    words = ("train", "--student", bench.inputs.student, "--data", bench.data, *QUICK)
    assert pkt(*words, "-o", trained).code == 0
    refused(3, "found a result of 'tuning'", **{"teacher-targets": trained})
    damaged = tmp_path / "damaged"
    shutil.copytree(bench.said, damaged)
    shard = next((damaged / "targets").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(1, "these targets are damaged", **{"teacher-targets": damaged})
    (damaged / "pkt_manifest.json").write_text("{")
    refused(1, "damaged", **{"teacher-targets": damaged})
    alone = pkt(*words, "--distill", "topk-kl", "-o", tmp_path / "out")
    assert (alone.code, "from which teacher" in alone.error) == (2, True)
    unused = pkt(*words, "--teacher-targets", bench.said, "-o", tmp_path / "out")
    assert (unused.code, "not used without --distill" in unused.error) == (2, True)


def test_the_built_in_student_comes_nearer_to_its_teacher(tmp_path: Path) -> None:
    """Full of such stories as it is, it learns from files what the teacher says of these."""
    teacher, student = DEMO / "stories260k", DEMO / "stories50k"
    data, said = DEMO / "stories_train.jsonl", tmp_path / "said"
    shared = ("--data", data, "--max-examples", 16, "--max-tokens", 96)
    words = ("--teacher", teacher, "--student", student, *shared, "--targets-only", "-q")
    assert pkt("align", *words, "-o", said).code == 0
    made = pkt(
        "train", "--student", student, *shared, "--distill", "topk-kl", "--teacher-targets", said,
        "--dropout", 0, "--batch-size", 16, "--micro-batch", 16, "--max-steps", 12, "--lr", "1e-3",
        "--no-gradient-checkpointing", "-o", tmp_path / "tuned", "-q",
    )  # fmt: skip
    assert made.code == 0, made.err
    from peft import PeftModel

    samples = package.api.prepare_training(
        str(student), data, max_examples=16, max_tokens=96
    ).samples.samples
    large = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    before = mean_agreement(agreement(small, large, samples)).kl
    tuned = PeftModel.from_pretrained(small, str(tmp_path / "tuned"))
    assert mean_agreement(agreement(tuned, large, samples)).kl < 0.95 * before


def test_a_disk_that_takes_no_more_costs_nothing_that_is_finished(
    bench: Bench, tmp_path: Path
) -> None:
    """Here the targets do not fit, though every file of hidden states did: these are kept."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert bench.align(whole, "-q", **{"top-k": 0}).code == 0
    size = next((whole / "targets").glob("*.safetensors")).stat().st_size
    words = [
        "align", "--targets-only", "--teacher", bench.inputs.teacher, "--student",
        bench.inputs.student, "--data", bench.data, "--top-k", 0, "-o", out,
    ]  # fmt: skip
    command = shlex.join([sys.executable, "-m", "pkt", *map(str, words)])
    limited = ["bash", "-c", f"ulimit -f {size // 1024 - 1}; exec {command}"]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "forward  4/4" in done.stderr
    assert "logits-00001-of-00001.safetensors: cannot write" in done.stderr
    again = pkt(*words)
    assert again.code == 0, again.err
    assert "forward" not in again.err.partition("at the peak")[2].partition("teacher's loss")[0]
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(bench: Bench, tmp_path: Path) -> None:
    words = [
        "--student", bench.inputs.student, "--data", bench.data, *QUICK, "--dropout", 0,
        "--distill", "topk-kl", "--teacher-targets", bench.said, "--distill-weight", 0.5,
    ]  # fmt: skip
    assert pkt("train", *words, "-o", tmp_path / "one").code == 0
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2,
        "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no",
        "-m", "pkt", "train", *words, "--device", "cpu", "-o", tmp_path / "two",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    ours, theirs = ([row["loss"] for row in rows] for rows in (one, two))
    assert ours == pytest.approx(theirs, rel=1e-4)
