"""A run that was interrupted anywhere, or whose work was damaged, ends in the same bytes.

Kills are real (SIGKILL, at random moments); Ctrl-C after a chosen step stands for the moments that
matter. Embedding, head and single weights are extracted too, so that every kind of file that a
work folder can hold is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pkt
import runs
import tiny
from pkt.errors import BudgetError, IncompatibleError, OutputError
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"rank": 4, "dtype": "float32", "select": "top-weights",
                           "embeddings": True}  # fmt: skip
STEPS = [
    ("forward", 1), ("forward", 3), ("forward", 4), ("head", 2), ("head", 5), ("backward", 1),
    ("backward", 2), ("backward", 4), ("ends", 3), ("ends", 5), ("factors", 2), ("factors", 3),
]  # fmt: skip
Step = tuple[str, int]


class Case:
    """One pair and its uninterrupted result."""

    def __init__(self, folder: Path, nursery: runs.Nursery) -> None:
        self.folder, self.nursery = folder, nursery
        self.teacher, self.student = build_pair(folder, "llama", "llama")
        self.seeds = write_seeds(folder / "seeds.jsonl")
        self.seconds = 0.0
        for name in ("warm", "whole"):
            begun = time.monotonic()
            code, text = self.child(folder / name)
            self.seconds = time.monotonic() - begun
            assert code == 0, text
        self.whole = runs.contents(folder / "whole")
        assert self.whole == runs.contents(folder / "warm")
        self._stopped: dict[Step, Path] = {}

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        return self.teacher, self.student, self.seeds

    def child(self, out: Path) -> tuple[int, str]:
        return self.nursery.run(*self.paths, out, **OPTIONS)

    def extract(self, out: Path, **options: Any) -> pkt.records.Extraction:
        paths = [options.pop(name, getattr(self, name)) for name in ("teacher", "student", "seeds")]
        return pkt.extract(*map(str, paths), out, **{**OPTIONS, **options})

    def stopped(self, step: Step, out: Path) -> Path:
        """A copy of a run that Ctrl-C ended after ``step``."""
        if step not in self._stopped:
            held = self.folder / f"{step[0]}-{step[1]}"

            def notify(phase: str, done: int, total: int) -> None:
                if (phase, done) == step:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                self.extract(held, notify=notify)
            self._stopped[step] = held
        shutil.copytree(self._stopped[step], out)
        return out


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with runs.Nursery() as nursery:
        yield Case(tmp_path_factory.mktemp("resume"), nursery)


def test_kills_at_random_moments_leave_no_trace(case: Case, tmp_path: Path) -> None:
    draw, killed = random.Random(0), 0
    for number in range(10):
        out = tmp_path / f"{number}"
        process = case.nursery.start(*case.paths, out, **OPTIONS)
        time.sleep(draw.uniform(0.02, 1.0) * case.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        code, text = case.nursery.finish()
        assert code in (0, -signal.SIGKILL), text
        killed += code != 0
        code, text = case.child(out)
        assert code == 0, text
        assert runs.contents(out) == case.whole
        assert not (out / ".work").exists()
    assert killed >= 5


def test_one_run_killed_again_and_again(case: Case, tmp_path: Path) -> None:
    draw, out = random.Random(1), tmp_path / "out"
    for _ in range(8):
        process = case.nursery.start(*case.paths, out, **OPTIONS)
        time.sleep(draw.uniform(0.2, 0.6) * case.seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        if case.nursery.finish()[0] == 0:
            break
    assert case.child(out)[0] == 0
    assert runs.contents(out) == case.whole


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_ctrl_c_after_a_step_keeps_it(step: Step, case: Case, tmp_path: Path) -> None:
    """No finished layer is computed again, and the result is the same."""
    out = case.stopped(step, tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == [".work"]
    seen: list[Step] = []
    case.extract(out, notify=lambda phase, done, total: seen.append((phase, done)))
    assert runs.contents(out) == case.whole
    order = ["forward", "head", "backward", "ends", "factors"]
    phases = [phase for phase, _ in seen]
    if step == ("head", 5):  # the file of all seeds was not yet closed
        assert phases[0] == "head"
        return
    for phase in order[: order.index(step[0])]:
        assert phase not in phases, "a finished phase was done again"
    if step[0] == "forward":
        assert phases.count("forward") == 4 - step[1]
    if step[0] == "backward":
        assert [done for phase, done in seen if phase == "backward"] == list(range(step[1] + 1, 5))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(64))


def remove(path: Path) -> None:
    path.unlink()


WORK = [
    (("forward", 3), "input-00000.bin"),
    (("forward", 3), "input-00002.bin"),
    (("forward", 3), "input-00003.bin"),
    (("forward", 3), "input-00003.sum.json"),
    (("head", 2), "input-00004.bin"),
    (("backward", 2), "input-00000.bin"),
    (("backward", 2), "input-00001.bin"),
    (("backward", 2), "input-00004.bin"),
    (("backward", 2), "upstream-00002.bin"),
    (("backward", 2), "layer-00002.json"),
    (("backward", 2), "layer-00003.json"),
    (("backward", 2), "losses.json"),
    (("backward", 2), "mask-00003-self_attn.q_proj.bits"),
    (("ends", 3), "input-00004.bin"),
    (("ends", 3), "upstream-00000.bin"),
    (("ends", 3), "layer-00000.json"),
    (("ends", 3), "losses.json"),
    (("factors", 2), "mask-00002-mlp.up_proj.bits"),
    (("factors", 2), "ends.json"),
]


@pytest.mark.parametrize("damage", [flip, halve, lengthen, remove], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("step", "name"), WORK, ids=str)
def test_damaged_work_is_done_again(
    step: Step, name: str, damage: Callable[[Path], None], case: Case, tmp_path: Path
) -> None:
    out = case.stopped(step, tmp_path / "out")
    damage(out / ".work" / "spool" / name)
    case.extract(out)
    assert runs.contents(out) == case.whole


@pytest.mark.parametrize("damage", [halve, flip], ids=lambda f: f.__name__)
def test_a_damaged_identity_is_refused(
    damage: Callable[[Path], None], case: Case, tmp_path: Path
) -> None:
    out = case.stopped(("backward", 2), tmp_path / "out")
    damage(out / ".work" / "run.json")
    with pytest.raises(OutputError, match=r"run\.json, which says of what, is damaged"):
        case.extract(out)
    case.extract(out, overwrite=True)
    assert runs.contents(out) == case.whole


def test_work_whose_identity_is_gone_is_not_used(case: Case, tmp_path: Path) -> None:
    """It may be anybody's: here that of as many other seeds, sound file by file."""
    out, seeds = case.stopped(("backward", 2), tmp_path / "out"), tmp_path / "other.jsonl"
    (out / ".work" / "run.json").unlink()
    write_seeds(seeds, seed=5)
    case.extract(out, seeds=seeds)
    case.extract(tmp_path / "fresh", seeds=seeds)
    assert runs.contents(out) == runs.contents(tmp_path / "fresh") != case.whole


def test_killed_while_it_makes_way_for_another(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--overwrite`` over unfinished work, ended after any of its files has gone."""
    fresh = tmp_path / "fresh"
    case.extract(fresh, select="window")
    wanted, unlink, rmtree = runs.contents(fresh), Path.unlink, shutil.rmtree
    for most in range(3):
        out, left = case.stopped(("backward", 2), tmp_path / f"{most}"), [most]

        def count(path: Path, left: list[int] = left, out: Path = out) -> None:
            if out / ".work" in Path(path).parents:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1

        def gone(path: Path, *more: Any, count: Any = count, **options: Any) -> None:
            count(path)
            unlink(path, *more, **options)

        def removed(path: Path, *more: Any, count: Any = count, **options: Any) -> None:
            for inner in sorted(Path(path).rglob("*")):
                count(inner)
                unlink(inner)
            rmtree(path, *more, **options)

        monkeypatch.setattr(Path, "unlink", gone)
        monkeypatch.setattr("pkt.output.shutil.rmtree", removed)
        with pytest.raises(KeyboardInterrupt):
            case.extract(out, select="window", overwrite=True)
        monkeypatch.undo()
        case.extract(out, select="window", overwrite=True)
        assert runs.contents(out) == wanted


def test_a_family_that_does_not_load_costs_nothing_that_is_finished(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continued where another transformers is installed: exit 3, and the work stays."""
    out = case.stopped(("backward", 2), tmp_path / "out")
    before = runs.contents(out)

    def refuse(*args: Any) -> Any:
        raise IncompatibleError("transformers knows no such family")

    monkeypatch.setattr("pkt.methods.seeking.build_skeleton", refuse)
    with pytest.raises(IncompatibleError):
        case.extract(out)
    assert {n: b for n, b in runs.contents(out).items() if "lock" not in n} == {
        n: b for n, b in before.items() if "lock" not in n
    }
    with pytest.raises(IncompatibleError):
        case.extract(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    case.extract(out)
    assert runs.contents(out) == case.whole


def changed_inputs(case: Case, folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Name → (options, what the refusal must name)."""
    other, student = folder / "sharded", folder / "student"
    tiny.build("llama", other, "teacher", vocab=128, shards=3)
    tiny.write_tokenizer(other, 128)
    tiny.build("llama", student, "student", vocab=128, layers=2)
    tiny.write_tokenizer(student, 128)
    seeds = write_seeds(folder / "other.jsonl", seed=5)
    return {
        "seeds": ({"seeds": seeds}, "seeds.sha256"),
        "teacher": ({"teacher": other}, "teacher.headers_sha256"),
        "student": ({"student": student}, "student.headers_sha256"),
        "rank": ({"rank": 5}, "options.rank"),
        "select": ({"select": "window"}, "options.select"),
        "layers": ({"layers": "last"}, "options.layers"),
        "dtype": ({"dtype": "bfloat16"}, "options.dtype"),
        "limit": ({"limit": 3}, "options.limit"),
        "targets": ({"targets": ("q",)}, "options.targets"),
    }


def test_changed_inputs_are_refused_by_name(case: Case, tmp_path: Path) -> None:
    out = case.stopped(("backward", 2), tmp_path / "out")
    before = runs.contents(out)
    for name, (options, named) in changed_inputs(case, tmp_path).items():
        with pytest.raises(OutputError, match="an unfinished run with other inputs") as caught:
            case.extract(out, **options)
        text = str(caught.value)
        assert named in text, name
        if name not in ("seeds", "student", "teacher", "limit"):
            assert text.endswith(f"changed: {named}")
        assert caught.value.exit_code == 1
        assert "--overwrite" in str(caught.value.hint)
    after = runs.contents(out)
    assert {n: b for n, b in before.items() if "lock" not in n} == {
        n: b for n, b in after.items() if "lock" not in n
    }
    case.extract(out)
    assert runs.contents(out) == case.whole


def test_what_does_not_change_the_result_may_change(case: Case, tmp_path: Path) -> None:
    out = case.stopped(("backward", 2), tmp_path / "out")
    made = case.extract(out, io="mmap", max_ram="8GiB")
    assert made.run["io"] == "mmap"
    assert runs.contents(out) == case.whole


def test_a_budget_that_is_too_small_is_refused_before_anything(case: Case, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        case.extract(tmp_path / "out", max_ram="100MiB")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    hint = str(caught.value.hint)
    assert hint.startswith("the smallest setting that fits is --max-ram ")
    case.extract(tmp_path / "out", max_ram=hint.rsplit(" ", 1)[-1])
    assert runs.contents(tmp_path / "out") == case.whole


def test_a_second_process_is_refused_while_the_first_runs(case: Case, tmp_path: Path) -> None:
    out, told = tmp_path / "out", []

    def notify(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("forward", 2):
            told.append(case.child(out))

    case.extract(out, notify=notify)
    (code, text) = told[0]
    assert code == 1
    assert text.startswith(f"{out}: in use by another pkt")
    assert f"process {os.getpid()}" in text
    assert runs.contents(out) == case.whole


def forbid(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a finished run needs no weight")


def test_a_finished_run_returns_at_once(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.folder / "whole", out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    monkeypatch.setattr("pkt.methods.seeking.run", forbid)
    made = case.extract(out, max_ram="1KiB")  # not even a budget is needed
    assert made.manifest == json.loads((out / "pkt_manifest.json").read_text())
    assert made.run == json.loads((out / "pkt_run.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == stamps


def test_another_run_does_not_replace_a_finished_one(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.folder / "whole", out)
    with pytest.raises(OutputError, match="expected an empty folder or this run's own") as caught:
        case.extract(out, rank=3)
    assert "--overwrite" in str(caught.value.hint)
    assert runs.contents(out) == case.whole
    case.extract(out, rank=3, overwrite=True)
    fresh = tmp_path / "fresh"
    case.extract(fresh, rank=3)
    assert runs.contents(out) == runs.contents(fresh) != case.whole


@pytest.mark.parametrize("files", [["notes.txt"], ["pkt_manifest.json", "notes.txt"]])
def test_files_of_others_are_never_removed(files: list[str], case: Case, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"notes\.txt") as caught:
            case.extract(tmp_path, overwrite=overwrite)
        assert "choose another -o" in str(caught.value.hint)
    assert runs.contents(tmp_path) == dict.fromkeys(sorted(files), b"mine")


def test_overwrite_replaces_an_unfinished_run_with_other_inputs(case: Case, tmp_path: Path) -> None:
    out = case.stopped(("backward", 2), tmp_path / "out")
    case.extract(out, select="window", overwrite=True)
    fresh = tmp_path / "fresh"
    case.extract(fresh, select="window")
    assert runs.contents(out) == runs.contents(fresh)


class TestKilledWhilePublishing:
    """The manifest is there, the work folder not yet gone, or only a part of the results is."""

    def test_the_same_run_ends_in_the_same_bytes(self, case: Case, tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(case.folder / "whole", out)
        (out / ".work").mkdir()
        case.extract(out)
        assert runs.contents(out) == case.whole
        assert not (out / ".work").exists()

    def test_another_run_does_not_replace_it(self, case: Case, tmp_path: Path) -> None:
        out = tmp_path / "out"
        shutil.copytree(case.folder / "whole", out)
        (out / ".work").mkdir()
        with pytest.raises(OutputError):
            case.extract(out, rank=3)
        assert {n: b for n, b in runs.contents(out).items() if ".work" not in n} == case.whole

    def test_half_a_file_that_a_kill_left_is_not_published(
        self, case: Case, tmp_path: Path
    ) -> None:
        """safetensors writes beside the name and renames: a kill leaves ``.tmpXXXXXX``."""
        out = case.stopped(("factors", 3), tmp_path / "out")
        (out / ".work" / "result" / "report").mkdir(parents=True)
        (out / ".work" / "result" / ".tmpTMKf7O").write_bytes(b"half")
        (out / ".work" / "result" / "report" / "spectra.png.tmp").write_bytes(b"half")
        case.extract(out)
        assert runs.contents(out) == case.whole

    def test_a_part_of_the_results_is_replaced(self, case: Case, tmp_path: Path) -> None:
        out = case.stopped(("factors", 3), tmp_path / "out")
        shutil.copytree(case.folder / "whole" / "report", out / "report")
        (out / "adapter_config.json").write_text("half")
        case.extract(out)
        assert runs.contents(out) == case.whole


def test_an_empty_work_folder_does_not_open_the_folder_of_others(
    case: Case, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".work").mkdir()
    with pytest.raises(OutputError, match=r"notes\.txt"):
        case.extract(tmp_path)


@pytest.mark.parametrize("name", ["pkt_run.json", "adapter_model.safetensors", "pkt_manifest.json"])
@pytest.mark.parametrize("damage", [halve, remove], ids=lambda f: f.__name__)
def test_a_finished_run_of_which_a_file_is_gone_is_made_again(
    damage: Callable[[Path], None], name: str, case: Case, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(case.folder / "whole", out)
    damage(out / name)
    if name == "pkt_manifest.json":  # whose the rest is nobody knows
        with pytest.raises(OutputError, match="expected an empty folder"):
            case.extract(out)
        case.extract(out, overwrite=True)
        assert runs.contents(out) == case.whole
        return
    case.extract(out)
    assert runs.contents(out) == case.whole
