"""Hostile checkpoints end in one line and the right code, at once and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands import Result, pkt
from hostile_cases import CASES, SOUND
from hostile_models import Case, Damage, Model

#: Of Python objects, texts and buffers; the cap of a header is 100 MB, which one case fills.
PEAK_BYTES = 32 << 20
LARGE = {"a header of 99 MB of nothing": 256 << 20}


def written(folder: Path, damage: Damage) -> Path:
    model = Model()
    damage(model)
    return model.write(folder / "model")


def one_line(ended: Result, case: Case) -> None:
    assert ended.code == case.code, ended.err
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert lines[0].startswith("pkt: error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), ended.err
    assert case.said in lines[0]
    assert "Traceback" not in ended.err
    assert "bug in pkt" not in ended.err
    assert len(ended.err) < 2000
    assert all(character.isprintable() for line in lines for character in line)


def peak_bytes() -> int:
    """The most memory that this process has held since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) << 10


def forget_peak() -> int:
    """What this process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_there_are_many_and_each_has_a_name_of_its_own() -> None:
    names = [(group, case.name) for group, case in CASES]
    assert len(set(names)) == len(names) >= 60


@pytest.mark.parametrize(
    "case", [case for _, case in CASES], ids=[f"{group}: {case.name}" for group, case in CASES]
)
def test_a_hostile_checkpoint_is_refused(case: Case, tmp_path: Path) -> None:
    model = written(tmp_path, case.damage)
    before, read = forget_peak(), bytes_read()
    ended = pkt("inspect", "--teacher", model)
    held, read = peak_bytes() - before, bytes_read() - read
    one_line(ended, case)
    assert held < LARGE.get(case.name, PEAK_BYTES)
    assert read < LARGE.get(case.name, PEAK_BYTES)


@pytest.mark.parametrize("name", SOUND)
def test_a_strange_checkpoint_is_not_refused(name: str, tmp_path: Path) -> None:
    ended = pkt("inspect", "--teacher", written(tmp_path, SOUND[name]))
    assert ended.code == 0, ended.err
    assert ended.err == ""


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(name: str, tmp_path: Path) -> None:
    model = written(tmp_path, lambda model: None)
    (model / name).chmod(0)
    one_line(pkt("inspect", "--teacher", model), Case("", lambda m: None, name))


@pytest.mark.parametrize("name", ["data cut short", "a config that is a pipe"])
def test_the_command_itself_says_the_same(name: str, tmp_path: Path) -> None:
    case = next(case for _, case in CASES if case.name == name)
    words = [
        sys.executable,
        "-m",
        "pkt",
        "inspect",
        "--teacher",
        str(written(tmp_path, case.damage)),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    one_line(Result(done.returncode, done.stdout, done.stderr), case)
