"""States, map and attribution: killed, resumed, damaged, reused, refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import pkt
import runs
import tiny
from pkt.api import prepare_targets
from pkt.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    IncompatibleError,
    OutputError,
    UsageError,
)
from pkt.targets import FOLDER, Targets
from tiny_tokenizer import write_tokenizer

torch.set_num_threads(1)
WORDS = "a bat can dig each far gap his ink jar kit low map not old pan quiz run sit".split()  # noqa: SIM905
OPTIONS: dict[str, Any] = {
    "top_k": 7, "dtype": "float32", "states": True, "attribution_examples": 3,
}  # fmt: skip
#: Both ways in which rows are kept for later: raw boundaries, and what sub-layers add.
CASES: dict[str, dict[str, Any]] = {
    "span": {"interface": "span", "pair_by": "attribution"},
    "mlp": {"interface": "mlp", "interpolate": True},
    "flex": {"interface": "span", "map": "flex"},
}


def write(folder: Path, out: Path, **options: Any) -> pkt.records.Recording:
    paths = [options.pop(name, folder / name) for name in ("teacher", "student", "data.jsonl")]
    return pkt.write_targets(*map(str, paths), out, **{**OPTIONS, **options})


def prepared(folder: Path, **options: Any) -> Any:
    paths = (str(folder / name) for name in ("teacher", "student", "data.jsonl"))
    return prepare_targets(*paths, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    tiny.build("llama", folder / "teacher", "teacher", vocab=128, shards=3, layers=5)
    tiny.build("llama", folder / "student", "student", vocab=128, seed=1)
    for name in ("teacher", "student"):
        tiny.write_tokenizer(folder / name, 128)
    choose = random.Random(0)
    rows = [{"text": " ".join(choose.choice(WORDS) for _ in range(6 + i))} for i in range(7)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def whole(pair: Path) -> dict[str, dict[str, bytes]]:
    """The bytes of uninterrupted runs, in several files for each layer."""
    found = {}
    for name, options in CASES.items():
        with small_shards():
            write(pair, pair / f"whole-{name}", **options)
        found[name] = runs.contents(pair / f"whole-{name}")
        assert sum("/states-" in path for path in found[name]) >= 6
    return found


def small_shards() -> Any:
    return mock.patch("pkt.targets.SHARD_BYTES", 2000)


STEPS = {
    "span": [("forward", 3), ("head", 2), ("backward", 2), ("backward", 5), ("states", 1),
             ("states", 4), ("targets", 1), ("targets", 7)],
    "mlp": [("forward", 1), ("forward", 2), ("states", 1), ("states", 2), ("states", 5),
            ("forward", 5), ("targets", 7)],
    "flex": [("backward", 2), ("teacher", 1), ("teacher", 4), ("student", 2), ("maps", 1),
             ("maps", 3), ("states", 1), ("states", 4)],
}  # fmt: skip


@pytest.mark.parametrize(("case", "step"), [(c, step) for c in CASES for step in STEPS[c]])
def test_ctrl_c_after_a_step_keeps_it(
    case: str, step: tuple[str, int], pair: Path, whole: Any, tmp_path: Path
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == step:
            raise KeyboardInterrupt

    seen: list[tuple[str, int]] = []
    with small_shards():
        with pytest.raises(KeyboardInterrupt):
            write(pair, tmp_path / "out", notify=stop, **CASES[case])
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
        write(
            pair, tmp_path / "out", notify=lambda phase, done, _: seen.append((phase, done)),
            **CASES[case],
        )  # fmt: skip
    assert runs.contents(tmp_path / "out") == whole[case]
    if step[0] in ("states", "targets"):
        assert not any(phase == "backward" for phase, _ in seen), "attribution is kept"
        assert len([phase for phase, _ in seen if phase == "forward"]) < 5


@pytest.mark.parametrize("damage", ["flip", "gone"])
@pytest.mark.parametrize(
    "name", ["rows-*.bin", "states-*.safetensors", "kernel-*.safetensors", "input-*.bin"]
)
@pytest.mark.parametrize("case", list(CASES))
def test_damaged_work_is_made_again(
    case: str, name: str, damage: str, pair: Path, whole: Any, tmp_path: Path
) -> None:
    """Killed while rows are kept, between two layers, and then each kind of file is spoiled."""
    met: list[str] = []

    def stop(phase: str, done: int, total: int) -> None:
        work = tmp_path / "out" / ".work"
        rows = list((work / "spool").glob("rows-*.bin"))
        if phase == "forward" and rows and list((work / "result" / FOLDER).glob("states*")):
            met.append(phase)
            raise KeyboardInterrupt

    with small_shards():
        with pytest.raises(KeyboardInterrupt):
            write(pair, tmp_path / "out", notify=stop, **CASES[case])
        assert met
        work = tmp_path / "out" / ".work"
        place = work / "result" / FOLDER if name.endswith("safetensors") else work / "spool"
        paths = sorted(place.glob(name))
        assert paths
        for path in paths:
            if damage == "gone":
                path.unlink()
                continue
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        write(pair, tmp_path / "out", **CASES[case])
    assert runs.contents(tmp_path / "out") == whole[case]


@pytest.mark.parametrize(
    "case",
    [case if case == "span" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_bytes(
    case: str, pair: Path, tmp_path: Path
) -> None:
    paths = (pair / "teacher", pair / "student", pair / "data.jsonl")
    options = {**OPTIONS, **CASES[case]}
    moments, kills = random.Random(1), 0
    with runs.Nursery() as nursery:
        began = time.monotonic()
        code, text = nursery.run(*paths, tmp_path / "whole", call="write_targets", **options)
        assert code == 0, text
        length = time.monotonic() - began
        for number in range(3):
            out = tmp_path / f"{number}"
            process = nursery.start(*paths, out, call="write_targets", **options)
            time.sleep(moments.uniform(0.1, 0.9) * length)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            kills += nursery.finish()[0] == -signal.SIGKILL
            code, text = nursery.run(*paths, out, call="write_targets", **options)
            assert code == 0, text
            assert runs.contents(out) == runs.contents(tmp_path / "whole")
    assert kills


@pytest.mark.parametrize("case", list(CASES))
def test_reading_modes_and_places_change_no_byte(
    case: str, pair: Path, whole: Any, tmp_path: Path
) -> None:
    with small_shards():
        for number, options in enumerate([
            {"io": "direct"}, {"io": "mmap", "spool_dir": tmp_path / "elsewhere"},
        ]):  # fmt: skip
            write(pair, tmp_path / f"{number}", **options, **CASES[case])
            assert runs.contents(tmp_path / f"{number}") == whole[case]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("options", [*CASES.values(), {"interface": "block"}, {}])
def test_disk_is_what_was_planned(options: dict[str, Any], pair: Path, tmp_path: Path) -> None:
    task, largest = prepared(pair, **options), 0

    def look(phase: str, done: int, total: int) -> None:
        nonlocal largest
        spool = tmp_path / "out" / ".work"
        largest = max(largest, sum(path.stat().st_size for path in spool.rglob("*.bin")))

    write(pair, tmp_path / "out", notify=look, **options)
    assert task.plan.spool_bytes / 3 < largest <= task.plan.spool_bytes
    size = sum(path.stat().st_size for path in (tmp_path / "out" / FOLDER).glob("*.safetensors"))
    assert 0 <= size - task.plan.record_bytes < 1000 * 12  # headers


def test_what_is_finished_is_returned_and_parts_are_reused(pair: Path, tmp_path: Path) -> None:
    """Another run in the same folder takes map and attribution from there, where they fit."""
    out = tmp_path / "out"
    made = write(pair, out, critical=2)
    assert write(pair, out, critical=2).manifest == made.manifest
    with pytest.raises(OutputError, match="expected an empty folder"):
        write(pair, out, critical=1)
    phases: set[str] = set()
    with mock.patch("pkt.semantics.bases.Bases.grams", side_effect=AssertionError):
        again = write(
            pair, out, critical=1, states_dtype="float32", overwrite=True,
            notify=lambda phase, done, total: phases.add(phase),
        )  # fmt: skip
    assert "backward" not in phases
    assert again.manifest["attribution"] == made.manifest["attribution"]
    fresh = write(pair, tmp_path / "fresh", critical=1, states_dtype="float32")
    assert fresh.manifest == again.manifest
    assert runs.contents(out) == runs.contents(tmp_path / "fresh")
    lost = next((out / FOLDER).glob("states-*"))
    lost.unlink()
    write(pair, out, critical=1, states_dtype="float32")
    assert runs.contents(out) == runs.contents(tmp_path / "fresh")


def test_another_teacher_takes_nothing_of_the_last_one(pair: Path, tmp_path: Path) -> None:
    """Its headers are the same ones: only its weights differ."""
    other = tiny.build("llama", tmp_path / "t", "teacher", vocab=128, shards=3, layers=5, seed=9)
    tiny.write_tokenizer(other, 128)
    write(pair, tmp_path / "out", critical=2)
    again = write(pair, tmp_path / "out", critical=2, teacher=other, overwrite=True)
    fresh = write(pair, tmp_path / "fresh", critical=2, teacher=other)
    assert again.manifest == fresh.manifest
    assert runs.contents(tmp_path / "out") == runs.contents(tmp_path / "fresh")


# Heads


def test_a_tied_head_is_the_embedding(pair: Path, tmp_path: Path) -> None:
    tied = tiny.build("llama", tmp_path / "teacher", "teacher", vocab=128, tied=True)
    tiny.write_tokenizer(tied, 128)
    made = write(pair, tmp_path / "out", teacher=tied)
    assert made.manifest["heads"]["teacher"]["rank"] == 48
    assert made.manifest["heads"]["teacher"]["ridge"] == 0


def test_a_singular_head_gets_a_ridge_and_an_empty_one_is_refused(
    pair: Path, tmp_path: Path
) -> None:
    student = tiny.build("llama", tmp_path / "student", "student", vocab=128, seed=1)
    tiny.write_tokenizer(student, 128)
    tensors = load_file(student / "model.safetensors")
    tensors["lm_head.weight"][:, 5] = tensors["lm_head.weight"][:, 4]
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    made = write(pair, tmp_path / "out", student=student, fold_norm=False)
    assert made.manifest["heads"]["student"]["rank"] == 31
    assert made.manifest["heads"]["student"]["ridge"] > 0
    tensors["lm_head.weight"].zero_()
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match="no row that is not zero"):
        write(pair, tmp_path / "none", student=student)
    assert not (tmp_path / "none").exists()


def test_a_broken_head_is_named(pair: Path, tmp_path: Path) -> None:
    student = tiny.build("llama", tmp_path / "student", "student", vocab=128, seed=1)
    tiny.write_tokenizer(student, 128)
    tensors = load_file(student / "model.safetensors")
    tensors["lm_head.weight"][9, 4] = float("inf")
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*inf"):
        write(pair, tmp_path / "out", student=student)


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"pairs": "9:1"}, UsageError, "teacher layer 9: expected 1 to 5"),
        ({"pairs": "2:4"}, UsageError, "student layer 4: expected 1 to 3"),
        ({"pairs": "2"}, UsageError, "expected TEACHER:STUDENT"),
        ({"pairs": "2:1,3:1"}, UsageError, "stands there twice"),
        ({"pairs": "2:1", "critical": 1}, UsageError, "leave out --critical"),
        ({"pair_by": "attribution", "interpolate": True}, UsageError, "leave out --critical"),
        ({"pairs": "3:1,2:2", "interface": "span"}, UsageError, "span between them is empty"),
        ({"critical": 6}, UsageError, "expected 0 to 5 layers"),
        ({"critical": -1}, UsageError, "expected 0 to 5 layers"),
        ({"interface": "head"}, UsageError, "--interface head: expected one of"),
        ({"map": "rotation"}, UsageError, "--map rotation: expected one of"),
        ({"states_dtype": "float64"}, UsageError, "--states-dtype float64"),
        ({"attribution": "squared"}, UsageError, "--attribution squared"),
        ({"attribution_examples": 0}, UsageError, "expected 1 or more"),
        ({"states": False, "critical": 1}, UsageError, "--critical: not used without --states"),
        ({"max_ram": "100MiB"}, BudgetError, "at its peak"),
    ],
)
def test_requests_that_make_no_sense(
    options: dict[str, Any], error: type[Exception], text: str, pair: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=text):
        write(pair, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_student_deeper_than_its_teacher(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="expected a teacher with at least"):
        write(pair, tmp_path / "out", teacher=pair / "student", student=pair / "teacher")


def test_vocabularies_and_texts_that_share_too_little(pair: Path, tmp_path: Path) -> None:
    student = tiny.build("llama", tmp_path / "student", "student", vocab=400, seed=1)
    write_tokenizer(student, 400)
    described = json.loads((student / "tokenizer.json").read_text())
    words = described["model"]["vocab"]
    strange = {w if n < 4 or len(w) > 1 else f"{w}×": n for w, n in words.items()}
    described["model"] |= {"vocab": strange, "merges": []}
    (student / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(IncompatibleError, match="at least half of the smaller one") as error:
        write(pair, tmp_path / "out", student=student)
    assert "--allow-low-coverage" in str(error.value.hint)
    with pytest.raises(DataError, match="no answer token before which"):
        write(pair, tmp_path / "out", student=student, allow_low_coverage=True)


def test_changed_data_and_another_runs_folder(pair: Path, tmp_path: Path) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if phase == "states":
            raise KeyboardInterrupt

    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    data.write_text((pair / "data.jsonl").read_text())
    with pytest.raises(KeyboardInterrupt):
        write(pair, out, notify=stop, **{"data.jsonl": data})
    kept = runs.contents(out)
    data.write_text(data.read_text().replace("bat", "kit"))
    with pytest.raises(OutputError, match=r"other inputs is there; changed: .*data\.sha256"):
        write(pair, out, **{"data.jsonl": data})
    with pytest.raises(OutputError, match=r"changed: .*states\.map"):
        write(pair, out, map="random")
    assert {k: v for k, v in runs.contents(out).items() if "lock" not in k} == {
        k: v for k, v in kept.items() if "lock" not in k
    }


def test_states_too_large_for_float16_are_refused(pair: Path, tmp_path: Path) -> None:
    teacher = tiny.build("llama", tmp_path / "teacher", "teacher", vocab=128)
    tiny.write_tokenizer(teacher, 128)
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 1e6
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    wanted = {"teacher": teacher, "map": "truncate", "states_dtype": "float16"}
    with pytest.raises(pkt.errors.PktError, match="cannot be stored as F16"):
        write(pair, tmp_path / "out", **wanted)
    write(pair, tmp_path / "wide", **{**wanted, "states_dtype": "bfloat16"})


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "aligned"])
def test_damaged_states_are_named(damage: str, pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(pair, out, map="truncate")
    path = next((out / FOLDER).glob("states-00002-*"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "gone":
        path.unlink()
    else:
        path = out / FOLDER / "index.json"
        index = json.loads(path.read_text())
        if damage == "index":
            index["states"]["files"].pop()
        else:
            index["states"]["aligned"] = [[99]] * 7
        path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=path.name):
        Targets(out / FOLDER)
