"""A teacher that stays in memory: the numbers are those of its written targets."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pkt as package
import tiny
from commands import Inputs, build_inputs, pkt, write_seeds
from pkt.api import prepare_targets
from pkt.methods.targeting import online
from pkt.targets import FOLDER, Targets
from runs import Nursery, contents

QUICK: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "micro_batch": 2, "lr": 1e-2}


class Bench:
    """A pair, one of another tokenizer, and data."""

    def __init__(self, folder: Path) -> None:
        self.inputs: Inputs = build_inputs(folder)
        rows = [
            {"question": f"is tag {i} big", "answer": f"dog and kid {i * i}"} for i in range(12)
        ]
        self.data = write_seeds(folder / "data.jsonl", rows)
        self.other = folder / "other"
        tiny.build("gemma3", self.other, "teacher", vocab=112, seed=3)
        tiny.write_tokenizer(self.other, 112)

    def align(self, out: Path, teacher: Path | None = None, **options: Any) -> Any:
        pair = str(teacher or self.inputs.teacher), str(self.inputs.student)
        return package.align(*pair, self.data, out, **{**QUICK, **options})

    def train(self, out: Path, **options: Any) -> Any:
        return package.train(str(self.inputs.student), self.data, out, **{**QUICK, **options})

    def words(self, command: str, out: Path, *more: object) -> list[object]:
        given = {"teacher": self.inputs.teacher, "student": self.inputs.student, "data": self.data}
        found = [w for name, value in given.items() for w in (f"--{name}", value)]
        steps = ("--max-steps", 6, "--batch-size", 4, "--micro-batch", 2, "--lr", "1e-2")
        return [command, *found, "-o", out, "--online", *steps, *more]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("online"))


def same(offline: Any, online: Any, bound: float) -> None:
    """Losses step by step, and the adapters."""
    assert len(offline.metrics) == len(online.metrics)
    for one, other in zip(offline.metrics, online.metrics, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=bound, abs=bound), name
    ours, theirs = (load_file(m.folder / "adapter_model.safetensors") for m in (offline, online))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        far = float((weight - theirs[name]).norm())
        assert far <= 100 * bound * float(weight.norm()) + bound, name


@pytest.mark.parametrize(
    ("objective", "options", "states"),
    [
        ("v1", {"output_loss": "kl"}, {"interface": "mlp"}),
        ("v1", {}, {"interface": "attn", "pairs": "2:1,4:3"}),
        ("v1", {}, {"interface": "hidden", "critical": 0, "interpolate": True}),
        ("v2", {}, {}),
        ("v2", {"kl_weight": 0.0}, {"pairs": "1:1,3:2,4:3"}),
        ("acl", {}, {}),
        ("hidden-mse", {}, {"map": "cosine"}),
        ("v1", {}, {"interface": "mlp", "map": "ridge"}),
        pytest.param(
            "hidden-mse",
            {},
            {"map": "procrustes", "pair_by": "attribution"},
            marks=pytest.mark.slow,
        ),
        ("v2", {}, {"map": "flex"}),
    ],
)
@pytest.mark.parametrize("stored", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_the_numbers_of_written_targets(
    bench: Bench,
    tmp_path: Path,
    objective: str,
    options: dict[str, Any],
    states: dict[str, Any],
    stored: str,
) -> None:
    chosen = {"objective": objective, "states": {**states, "states_dtype": stored}, **options}
    offline = bench.align(tmp_path / "files", **chosen)
    live = bench.align(tmp_path / "memory", online=True, **chosen)
    # A state rounds to the other neighbour of its type where its float32 differs in the last bit.
    same(offline, live, 1e-6 if stored == "float32" else 2.0**-9)
    assert not (tmp_path / "memory.targets").exists()
    assert sorted(path.name for path in (tmp_path / "memory").iterdir()) == sorted(
        path.name for path in (tmp_path / "files").iterdir()
    )
    written = json.loads((tmp_path / "files.targets" / "pkt_manifest.json").read_text())
    assert live.manifest["targets"]["online"] is True
    assert live.manifest["pairs"] == written["pairs"]
    assert live.manifest.get("attribution") == written.get("attribution")


@pytest.mark.parametrize("objective", ["v1", "hidden-mse"])
def test_of_another_tokenizer(bench: Bench, tmp_path: Path, objective: str) -> None:
    chosen = {
        "objective": objective, "teacher": bench.other,
        "states": {"states_dtype": "float32", "allow_low_coverage": True},
    }  # fmt: skip
    offline = bench.align(tmp_path / "files", **chosen)
    live = bench.align(tmp_path / "memory", online=True, **chosen)
    same(offline, live, 1e-6)
    refused = pkt(
        *bench.words("align", tmp_path / "no", "--objective", "v2", "--teacher", bench.other),
        "--allow-low-coverage",
    )
    assert refused.code == 3
    assert "tokenizers" in refused.error


@pytest.mark.parametrize(("distill", "top_k"), [("topk-kl", 7), ("topk-kl", None), ("kl", None)])
def test_the_logits_of_written_targets(
    bench: Bench, tmp_path: Path, distill: str, top_k: int | None
) -> None:
    kept = 0 if distill == "kl" else top_k or 64
    pair = str(bench.inputs.teacher), str(bench.inputs.student)
    package.write_targets(*pair, bench.data, tmp_path / "said", top_k=kept)
    chosen = {"distill": distill, "distill_weight": 0.7}
    offline = bench.train(tmp_path / "files", teacher_targets=tmp_path / "said", **chosen)
    live = bench.train(
        tmp_path / "memory", teacher=pair[0], online=True, top_k=top_k, **chosen
    )  # fmt: skip
    same(offline, live, 1e-6)
    assert live.manifest["targets"]["top_k"] == offline.manifest["targets"]["top_k"]


def test_bit_equal_where_no_batch_was_shared(bench: Bench, tmp_path: Path) -> None:
    """One text: the written pass, too, took it through the layers alone."""
    data = write_seeds(tmp_path / "one.jsonl", [{"question": "is tag 3 big", "answer": "no dog"}])
    pair = str(bench.inputs.teacher), str(bench.inputs.student)
    for interface in ("mlp", "attn", "block", "hidden", "span"):
        options: dict[str, Any] = {"states": True, "interface": interface, "dtype": "bfloat16"}
        folder = tmp_path / interface
        package.write_targets(*pair, data, folder, **options)
        task = prepare_targets(*pair, data, online=True, output_dir=tmp_path / "x", **options)
        live = held(task, tmp_path / f"{interface}-work")
        read = Targets(folder / FOLDER)
        assert (live.pairs, live.interface, live.map, live.top_k, list(live.answers)) == (
            read.pairs, read.interface, read.map, read.top_k, read.answers,
        )  # fmt: skip
        assert torch.equal(live.aligned(0), read.aligned(0))
        for pair_of in read.pairs:
            ours, theirs = live.states(0, pair_of.student), read.states(0, pair_of.student)
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(parts(live.of(0)), parts(read.of(0)), strict=True):
            assert torch.equal(ours, theirs)


def held(task: Any, work: Path) -> Any:
    from pkt.api.fitting import reading
    from pkt.api.mapped import map_maker
    from pkt.methods import targeting

    work.mkdir()
    make = map_maker(task, "buffered", "cpu", lambda phase, done, total: None)
    live, _ = targeting.hold(
        task, work, logits=True, io=reading(task, "buffered"), device=torch.device("cpu"),
        make_map=make,
    )  # fmt: skip
    return live


def parts(top: Any) -> list[torch.Tensor]:
    return [top.logits, top.ids, top.logsumexp]


def test_one_pass_serves_an_example(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = str(bench.inputs.teacher), str(bench.inputs.student)
    task = prepare_targets(*pair, bench.data, states=True, online=True, output_dir=tmp_path / "x")
    live = held(task, tmp_path / "work")
    passes: list[int] = []
    through = live._sweep.states

    def counted(number: int, *given: Any, **named: Any) -> Any:
        passes.append(number)
        return through(number, *given, **named)

    monkeypatch.setattr(live._sweep, "states", counted)

    def ask() -> list[torch.Tensor]:
        return [
            tensor
            for example in (0, 1, 0)
            for tensor in (
                *parts(live.of(example)),
                *(live.states(example, pair.student) for pair in live.pairs),
            )
        ]

    first = ask()
    assert passes == [0, 1]
    live._kept.clear()
    monkeypatch.setattr(online, "KEPT_BYTES", 1)
    again = ask()
    assert passes == [0, 1, 0, 1, 0]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_students_mixed_precision_is_not_the_teachers(bench: Bench, tmp_path: Path) -> None:
    chosen = {"autocast": True, "objective": "v1", "states": {"states_dtype": "float32"}}
    chosen["output_loss"] = "kl"
    offline = bench.align(tmp_path / "files", **chosen)
    same(offline, bench.align(tmp_path / "memory", online=True, **chosen), 1e-6)


@pytest.mark.slow
def test_killed_at_any_moment_and_continued(bench: Bench, tmp_path: Path) -> None:
    options = {**QUICK, "objective": "v2", "max_steps": 8, "save_steps": 1, "online": True}
    paths = (bench.inputs.teacher, bench.inputs.student, bench.data)
    moments, out = random.Random(1), tmp_path / "out"
    with Nursery() as nursery:
        began = time.monotonic()
        code, text = nursery.run(*paths, tmp_path / "whole", call="align", **options)
        assert code == 0, text
        length, kills = time.monotonic() - began, 0
        while not (out / "pkt_manifest.json").exists():
            process = nursery.start(*paths, out, call="align", **options)
            if kills < 3:
                time.sleep(moments.uniform(0.1, 0.7) * length)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            code, text = nursery.finish()
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), text
    assert contents(out) == contents(tmp_path / "whole")


def test_what_the_command_says(bench: Bench, tmp_path: Path) -> None:
    planned = pkt(*bench.words("align", tmp_path / "out", "--dry-run"))
    assert planned.code == 0, planned.err
    assert "stays in memory" in planned.out
    assert not (tmp_path / "out").exists()
    words = bench.words("align", tmp_path / "out")
    made = pkt(*words)
    assert made.code == 0, made.err
    assert "teacher layer" in made.err
    assert "by attribution: of the" in made.err
    again = pkt(*words)
    assert again.err.count("finished already") == 1
    said = pkt(*bench.words("train", tmp_path / "said", "--distill", "kl"))
    assert said.code == 0, said.err
    assert "with the teacher in memory" in said.err


@pytest.mark.parametrize(
    ("command", "words", "code", "text"),
    [
        ("align", ["--targets-only"], 2, "--online: not used with --targets-only"),
        ("align", ["--teacher-targets", "said"], 2, "--teacher-targets: not used with --online"),
        ("align", ["--pairs", "9:1"], 2, "teacher layer 9"),
        ("train", [], 2, "--online: not used without --distill"),
        ("train", ["--distill", "kl", "--top-k", 3], 2, "--top-k 3: not used with kl"),
        ("train", ["--distill", "kl", "--teacher-targets", "said"], 2, "--teacher-targets"),
    ],
)
def test_refused_before_anything_is_read(
    bench: Bench, tmp_path: Path, command: str, words: list[object], code: int, text: str
) -> None:
    refused = pkt(*bench.words(command, tmp_path / "out", *words))
    assert refused.code == code, refused.err
    assert text in refused.error
    assert not (tmp_path / "out").exists()


def test_the_teacher_is_named_only_where_it_stays(bench: Bench, tmp_path: Path) -> None:
    words = [w for w in bench.words("train", tmp_path / "out") if w != "--online"]
    refused = pkt(*words)
    assert refused.code == 2
    assert "--teacher: not used without --online" in refused.error


@pytest.mark.parametrize(("command", "more"), [("align", []), ("train", ["--distill", "kl"])])
def test_both_must_fit(bench: Bench, tmp_path: Path, command: str, more: list[object]) -> None:
    refused = pkt(*bench.words(command, tmp_path / "out", *more, "--max-ram", "200MiB"))
    assert refused.code == 4, refused.err
    assert "teacher and student hold" in refused.error
    assert "without --online" in refused.hint
    assert not (tmp_path / "out").exists()
    smallest = refused.hint.split()[1]
    fits = pkt(*bench.words(command, tmp_path / "out", *more, "--max-ram", smallest))
    assert fits.code == 0, fits.err


def test_a_damaged_teacher_is_named(bench: Bench, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(bench.inputs.teacher, teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    words = [
        teacher if w == bench.inputs.teacher else w for w in bench.words("align", tmp_path / "o")
    ]
    refused = pkt(*words, "--pairs", "4:3")
    assert refused.code == 1
    assert "model.layers.2.mlp.up_proj.weight" in refused.error


def test_an_unfinished_run_goes_on_with_the_same_weights(bench: Bench, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(bench.inputs.teacher, teacher)
    chosen = {"teacher": teacher, "objective": "v2", "online": True}
    whole = bench.align(tmp_path / "whole", **chosen)
    for moment in (1, 3):  # while layers are attributed, and before the first step
        told: list[str] = []

        def stop(told: list[str] = told, moment: int = moment) -> bool:
            return len(told) > 2 * moment**2

        with pytest.raises(KeyboardInterrupt):
            bench.align(
                tmp_path / "out", stop=stop,
                metrics=lambda phase, *rest, told=told: told.append(phase), **chosen,
            )  # fmt: skip
    weights = teacher / "model.safetensors"
    os.utime(weights, (1, 1))
    refused = pkt(
        *bench.words("align", tmp_path / "out", "--teacher", teacher, "--objective", "v2")
    )
    assert refused.code == 1
    assert "weights" in refused.error
    made = bench.align(tmp_path / "out", overwrite=True, **chosen)
    assert made.metrics == whole.metrics
