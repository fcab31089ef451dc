"""Where the spool lies and how much of it is kept changes what a run costs, never what it makes.

Every family with every k; a folder of its own for the spool that is emptied, shared or left;
damage to every kind of work file; a disk that fills up; kills. Always the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pkt
import runs
from commands import pkt as command
from pkt.errors import BudgetError, OutputError, UsageError
from pkt.sweep import capture
from test_extract import build_pair, write_seeds

torch.set_num_threads(1)
OPTIONS: dict[str, Any] = {"rank": 4, "dtype": "float32", "embeddings": True}
STEPS = [("forward", 3), ("backward", 2), ("again", 1), ("backward", 4), ("ends", 3)]
Step = tuple[str, int]


class Case:
    """A pair whose teacher has seven layers, and what it makes with everything kept in OUT."""

    def __init__(self, folder: Path, nursery: runs.Nursery) -> None:
        self.folder, self.nursery = folder, nursery
        pair = build_pair(folder, "llama", "llama", big={"layers": 7})
        self.paths = *pair, write_seeds(folder / "seeds.jsonl", count=3)
        self.seconds = 0.0
        for name in ("warm", "whole"):
            begun = time.monotonic()
            code, text = nursery.run(*self.paths, folder / name, **OPTIONS, spool_every=1)
            self.seconds = time.monotonic() - begun
            assert code == 0, text
        self.whole = runs.contents(folder / "whole")

    def extract(self, out: Path, **options: Any) -> pkt.records.Extraction:
        teacher, student, seeds = map(str, self.paths)
        return pkt.extract(teacher, student, seeds, out, **{**OPTIONS, **options})

    def stop(self, out: Path, step: Step, **options: Any) -> None:
        """Begin a run that Ctrl-C ends after ``step``."""

        def notify(phase: str, done: int, total: int) -> None:
            if (phase, done) == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.extract(out, notify=notify, **options)

    def finish(self, out: Path, **options: Any) -> list[Step]:
        """Continue; the result must be the one, and nothing may be left behind."""
        seen: list[Step] = []
        self.extract(out, notify=lambda phase, done, total: seen.append((phase, done)), **options)
        assert runs.contents(out) == self.whole
        assert not (out / ".work").exists()
        return seen


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with runs.Nursery() as nursery:
        yield Case(tmp_path_factory.mktemp("spooling"), nursery)


# Every k


@pytest.mark.parametrize("family", ["gemma2", "olmo3", "gpt_neox", "qwen2_sliding"])
def test_every_k_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    teacher, student = build_pair(tmp_path, family, family, big={"layers": 5})
    seeds = write_seeds(tmp_path / "seeds.jsonl", count=3)
    made = {}
    for every in (1, 2, 3, 9):
        out = tmp_path / f"{every}"
        pkt.extract(str(teacher), str(student), seeds, out, rank=4, spool_every=every)
        made[every] = runs.contents(out)
    assert all(files == made[1] for files in made.values())


@pytest.mark.parametrize("scores", ["layer", "matrix"])
@pytest.mark.parametrize("every", [2, 3, 4, 7])
def test_every_k_with_embeddings_and_with_one_matrix_at_a_time(
    every: int, scores: Any, case: Case, tmp_path: Path
) -> None:
    paths = map(str, case.paths)
    task = pkt.api.prepare(*paths, **OPTIONS, spool_every=every)
    out, names = tmp_path / "out", set()

    def notify(phase: str, done: int, total: int) -> None:
        names.update(path.name for path in (out / ".work" / "spool").glob("input-*.bin"))
        if phase in ("again", "backward"):
            held = {int(path.name[6:11]) for path in (out / ".work/spool").glob("input-*.bin")}
            assert len(held) <= -(-7 // every) + every

    task = replace(task, plan=replace(task.plan, scores=scores, slots=2))
    pkt.api.execute(task, out, notify=notify)
    assert names
    assert runs.contents(out) == case.whole


def test_k_may_change_when_a_run_continues(case: Case, tmp_path: Path) -> None:
    for number, (first, then) in enumerate([(1, 3), (3, 1), (2, 5), (9, 2)]):
        for step in [("forward", 5), ("backward", 3)]:
            out = tmp_path / f"{number}-{step[0]}"
            case.stop(out, step, spool_every=first)
            seen = case.finish(out, spool_every=then)
            assert seen.count(("forward", 7)) == 0, "forward layers were done again"


def test_an_impossible_k_is_a_usage_error(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--spool-every 0: expected auto, or 1 or more"):
        case.extract(tmp_path / "out", spool_every=0)
    ended = command("inspect", "--teacher", case.paths[0], "--spool-every", "some")
    assert ended.code == 2
    assert "--spool-every" in ended.error


def test_inspect_prints_the_spool_and_its_room(case: Case, tmp_path: Path) -> None:
    options = ["--teacher", case.paths[0], "--spool-dir", tmp_path / "scratch"]
    ended = command("inspect", *options, "--spool-every", "3", "--limit", "4")
    assert ended.code == 0
    rows = {line[2:].split("  ")[0]: line for line in ended.out.splitlines() if line[:2] == "  "}
    assert (
        "of one layer in 3 (--spool-every); 4 layers are run forward" in rows["layer inputs kept"]
    )
    assert " while it runs, " in rows[f"disk for {tmp_path / 'scratch'}"]
    plan = json.loads(command("inspect", *options, "--json").out)["plan"]
    assert plan["spool_every"] == 1
    assert plan["disks"][0]["folder"] == str(tmp_path / "scratch")
    assert 0 < plan["disks"][0]["bytes"] < plan["disks"][0]["free_bytes"]
    assert not (tmp_path / "scratch").exists()


# A folder for the spool


def only_one(folder: Path, pattern: str = "*") -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_a_spool_elsewhere_is_used_and_removed(case: Case, tmp_path: Path) -> None:
    out, scratch = tmp_path / "out", tmp_path / "deep" / "scratch"
    case.stop(out, ("backward", 2), spool_dir=scratch)
    large = {path.name for path in only_one(scratch).glob("*.bin")}
    assert large == {"upstream-00005.bin", *(f"input-0000{i}.bin" for i in (0, 1, 2, 3, 4, 5, 7))}
    inside = {path.name for path in (out / ".work" / "spool").iterdir()}
    assert inside == {"elsewhere.json", "losses.json", "layer-00005.json", "layer-00006.json"}
    owner = json.loads((only_one(scratch) / "owner.json").read_text())
    assert owner == {"spool": str(out / ".work" / "spool")}
    seen = case.finish(out, spool_dir=scratch)
    assert seen[0] == ("backward", 3)
    assert list(scratch.iterdir()) == []


def test_what_one_matrix_at_a_time_keeps_lies_there_too(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs and gradients of a layer's matrices, which the plan counts on that disk."""
    made: set[Path] = set()

    class Seen(capture.Scratch):
        def __init__(self, path: Path, *more: Any) -> None:
            made.add(path)
            super().__init__(path, *more)

    monkeypatch.setattr(capture, "Scratch", Seen)
    scratch = tmp_path / "scratch"
    task = pkt.api.prepare(*map(str, case.paths), **OPTIONS, spool_dir=scratch)
    task = replace(task, plan=replace(task.plan, scores="matrix"))
    pkt.api.execute(task, tmp_path / "out")
    assert len(made) == 4 + 7  # q, k and v have one input, gate and up as well
    assert {path.parent.parent for path in made} == {scratch}
    assert list(scratch.iterdir()) == []
    assert runs.contents(tmp_path / "out") == case.whole


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def unmount(folder: Path) -> None:
    shutil.rmtree(folder.parent)


def lose_some(folder: Path) -> None:
    for path in sorted(folder.glob("*.bin"))[::2]:
        path.unlink()


@pytest.mark.parametrize("loss", [empty, unmount, lose_some], ids=lambda f: f.__name__)
@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_spool_that_is_lost_is_made_again(
    step: Step, loss: Callable[[Path], None], case: Case, tmp_path: Path
) -> None:
    """Layers that were scored are not scored again, and the result is the same."""
    out, options = tmp_path / "out", {"spool_dir": tmp_path / "scratch", "spool_every": 2}
    case.stop(out, step, **options)
    scored = len(list((out / ".work" / "spool").glob("layer-*.json")))
    loss(only_one(tmp_path / "scratch"))
    seen = case.finish(out, **options)
    assert [done for phase, done in seen if phase == "backward"] == list(range(scored + 1, 8))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_spool_that_is_lost_while_the_run_uses_it(case: Case, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    moments = [("forward", 5), ("backward", 3), ("again", 5), ("ends", 1)]

    def notify(phase: str, done: int, total: int) -> None:
        if (phase, done) in moments:
            moments.remove((phase, done))
            for path in only_one(scratch).glob("*.bin"):
                path.unlink()

    case.extract(tmp_path / "out", notify=notify, spool_dir=scratch, spool_every=3)
    assert not moments
    assert runs.contents(tmp_path / "out") == case.whole


def test_a_file_that_is_damaged_each_time_ends_the_run(case: Case, tmp_path: Path) -> None:
    """A disk that returns other bytes than were written must not keep a run busy for ever."""
    out = tmp_path / "out"

    def notify(phase: str, done: int, total: int) -> None:
        if phase in ("backward", "again"):
            flip(only_one(out / ".work" / "spool", "upstream-*.bin"))

    with pytest.raises(OutputError, match="though it was made again 3 times") as caught:
        case.extract(out, notify=notify)
    assert "--spool-dir" in str(caught.value.hint)
    case.finish(out)


def test_runs_that_share_a_folder_do_not_meet(case: Case, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    for name in ("a", "b"):
        case.stop(tmp_path / name, ("backward", 2), spool_dir=scratch)
    case.stop(tmp_path / "c", ("backward", 2), spool_dir=scratch, select="rows-cols")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert len(list(scratch.iterdir())) == 3
    copied = case.finish(tmp_path / "copy", spool_dir=scratch)
    assert copied[0] == ("again", 1), "it has no spool of its own yet"
    assert len(list(scratch.iterdir())) == 3
    for name in ("a", "b"):
        assert case.finish(tmp_path / name, spool_dir=scratch)[0] == ("backward", 3)
    case.extract(tmp_path / "c", spool_dir=scratch, overwrite=True)  # another run: c's is removed
    assert runs.contents(tmp_path / "c") == case.whole
    assert list(scratch.iterdir()) == []


def test_another_folder_or_none_from_the_next_command_on(case: Case, tmp_path: Path) -> None:
    out, one, two = tmp_path / "out", tmp_path / "one", tmp_path / "two"
    case.stop(out, ("forward", 4))
    case.stop(out, ("backward", 1), spool_dir=one)
    assert not list((out / ".work" / "spool").glob("*.bin"))
    case.stop(out, ("backward", 3), spool_dir=two)
    assert list(one.iterdir()) == []
    seen = case.finish(out)
    assert list(two.iterdir()) == []
    assert ("backward", 3) not in seen


@pytest.mark.parametrize("note", ["", "[]", '{"folder": 3}', '{"folder": "/"}', "elsewhere"])
def test_a_damaged_note_removes_nothing_of_others(note: str, case: Case, tmp_path: Path) -> None:
    out, scratch, other = tmp_path / "out", tmp_path / "scratch", tmp_path / "pkt-0123456789abcdef"
    case.stop(out, ("backward", 2), spool_dir=scratch)
    other.mkdir()
    (other / "owner.json").write_text('{"spool": "/another"}')
    text = json.dumps({"folder": str(other)}) if note == "elsewhere" else note
    (out / ".work" / "spool" / "elsewhere.json").write_text(text)
    case.finish(out, spool_dir=scratch)
    assert (other / "owner.json").is_file()


def test_a_folder_that_cannot_be_is_one_line(case: Case, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"--spool-dir .*file: cannot be used") as caught:
        case.extract(tmp_path / "out", spool_dir=tmp_path / "file")
    assert "a disk with room" in str(caught.value.hint)
    assert (tmp_path / "file").read_text() == "mine"


# Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, halve], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("step", "name"),
    [
        (("forward", 3), "input-00000.bin"),
        (("forward", 3), "input-00003.bin"),
        (("forward", 5), "input-00003.bin"),
        (("backward", 1), "input-00006.bin"),
        (("backward", 2), "input-00003.bin"),
        (("backward", 2), "upstream-00005.bin"),
        (("backward", 2), "upstream-00005.sum.json"),
        (("again", 1), "input-00004.bin"),
        (("again", 2), "input-00003.bin"),
        (("ends", 1), "input-00007.bin"),
        (("ends", 1), "upstream-00000.bin"),
    ],
    ids=str,
)
def test_damage_to_what_every_third_layer_leaves(
    step: Step, name: str, damage: Callable[[Path], None], case: Case, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", {"spool_dir": tmp_path / "scratch", "spool_every": 3}
    case.stop(out, step, **options)
    damage(only_one(tmp_path / "scratch") / name)
    scored = len(list((out / ".work" / "spool").glob("layer-*.json")))
    seen = case.finish(out, **options)
    assert [done for phase, done in seen if phase == "backward"] == list(range(scored + 1, 8))


@pytest.mark.parametrize("every", [1, 3])
def test_damage_while_a_layer_is_scored_counts_no_seed_twice(
    every: int, case: Case, tmp_path: Path
) -> None:
    """The last seed's part of a file is damaged: the seeds before it have been scored already."""
    out = tmp_path / "out"
    spool = out / ".work" / "spool"
    damaged = []

    def notify(phase: str, done: int, total: int) -> None:
        for name in {("backward", 2): ["input-00004"], ("backward", 3): ["upstream-00004"]}.get(
            (phase, done), []
        ):
            if name not in damaged:
                damaged.append(name)
                data = bytearray((spool / f"{name}.bin").read_bytes())
                data[-1] ^= 1
                (spool / f"{name}.bin").write_bytes(data)

    case.extract(out, notify=notify, spool_every=every)
    assert damaged[-1] == "upstream-00004"
    assert runs.contents(out) == case.whole


# Kills and full disks


@pytest.mark.parametrize("moments", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_kills_with_segments_and_a_spool_elsewhere(
    moments: int, case: Case, tmp_path: Path
) -> None:
    draw, killed = random.Random(moments), 0
    for number in range(moments):
        out, options = tmp_path / f"{number}", {**OPTIONS, "spool_every": 1 + number % 4}
        options["spool_dir"] = str(tmp_path / "scratch")
        for _ in range(2):
            process = case.nursery.start(*case.paths, out, **options)
            time.sleep(draw.uniform(0.02, 0.9) * case.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            code, text = case.nursery.finish()
            assert code in (0, -signal.SIGKILL), text
            killed += code != 0
        code, text = case.nursery.run(*case.paths, out, **options)
        assert code == 0, text
        assert runs.contents(out) == case.whole
    assert list((tmp_path / "scratch").iterdir()) == []
    assert killed >= moments // 2


def own_mounts() -> bool:
    found = shutil.which("unshare")
    return bool(found) and subprocess.run([str(found), "-rm", "true"], check=False).returncode == 0


SMALL_DISK = """
mount -t tmpfs -o size=$SIZE tmpfs "$DISK"
"$PYTHON" "$SCRIPT" fill; echo "first $?"
rm "$DISK/filler"
"$PYTHON" "$SCRIPT"; echo "second $?"
"""
FILLING = """
import json, sys
import pkt, runs
from pathlib import Path

order = json.loads(Path(sys.argv[0]).with_suffix(".json").read_text())
filling = False

def fill(phase, done, total):
    global filling
    filling |= [phase, done] == order["step"]
    if filling and sys.argv[1:]:
        with open(Path(order["disk"]) / "filler", "ab", 0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

try:
    with runs.pictureless():
        pkt.extract(*order["paths"], notify=fill, **order["options"])
except pkt.errors.PktError as error:
    print("said", error.exit_code, error, error.hint)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(not own_mounts(), reason="no mount of its own for a process here")
@pytest.mark.parametrize("place", ["out", pytest.param("scratch", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(["forward", 2], marks=pytest.mark.slow),
        pytest.param(["head", 3], marks=pytest.mark.slow),
        ["backward", 2],
        pytest.param(["again", 1], marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_and_then_has_room(
    step: list[Any], place: str, case: Case, tmp_path: Path
) -> None:
    """The run ends with one line, and continues once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    out, options = tmp_path / "out", {**OPTIONS, "spool_every": 3}
    if place == "out":
        out = disk / "out"
    else:
        options["spool_dir"] = str(disk)
    script = tmp_path / "script.py"
    script.write_text(FILLING)
    order = {"step": step, "disk": str(disk), "paths": [*map(str, case.paths), str(out)]}
    script.with_suffix(".json").write_text(json.dumps({**order, "options": options}))
    env = {
        **os.environ, "SIZE": "4m", "DISK": str(disk), "PYTHON": sys.executable,
        "SCRIPT": str(script), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
    }  # fmt: skip
    copy = f'{SMALL_DISK}\ncp -r "{out}" "{tmp_path / "copy"}"'
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", copy], env=env, capture_output=True, text=True, check=False
    )
    assert "first 1\n" in ended.stdout, ended.stdout + ended.stderr
    assert "said 1 " in ended.stdout
    assert "the disk is full; " in ended.stdout
    assert "make room, then run the same command again" in ended.stdout
    assert "second 0\n" in ended.stdout, ended.stdout + ended.stderr
    assert runs.contents(tmp_path / "copy") == case.whole


@pytest.mark.skipif(not own_mounts(), reason="no mount of its own for a process here")
def test_the_plan_asks_the_disk(case: Case, tmp_path: Path) -> None:
    """On a small disk every k-th boundary is kept, on a smaller one the run is refused."""
    task = pkt.api.prepare(*map(str, case.paths), **OPTIONS)
    (every, least), whole = task.plan.least_spool, task.plan.spool_bytes
    assert whole - least > 2 * 4096
    found = []
    for size in (least - 4096, least, whole):
        script = (
            f'mount -t tmpfs -o size={-(-size // 4096) * 4096} tmpfs "{tmp_path}" && '
            f'exec "{sys.executable}" -m pkt inspect --teacher "{case.paths[0]}" --json '
            f"--limit 1 --max-tokens {task.seeds.tokens} --dtype float32 --embeddings "
            f'--spool-dir "{tmp_path}/spool"'
        )
        ended = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        found.append((ended.returncode, json.loads(ended.stdout)["plan"]["spool_every"]))
    assert found == [(4, every), (0, every), (0, 1)]


def test_a_run_that_no_disk_can_hold_is_refused_before_it_reads(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=9000, free=5000))
    with pytest.raises(
        BudgetError, match=r"out/\.work: this run writes .*4\.88 KiB free"
    ) as caught:
        case.extract(tmp_path / "out")
    assert caught.value.exit_code == 4
    assert "--spool-dir" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
