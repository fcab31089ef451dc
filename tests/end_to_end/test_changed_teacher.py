"""A teacher that changes while it is read: one line that names the file, in every reading mode.

The change happens at a known place: when the first forward layer is reported. Each run is a process
of its own, so that a signal would end it and not the tests.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from commands import Inputs, Result, build_inputs, result_bytes

# argv: what to do, to which file, and the command.
SCRIPT = """
import os, sys
from pathlib import Path
from pkt.cli import main, running

change, path = sys.argv[1], Path(sys.argv[2])

class Changing(running.Progress):
    def __call__(self, phase, done, total):
        if (phase, done) == ("forward", 1):
            if change == "cut":
                os.truncate(path, 5000)
            elif change == "write":
                with path.open("r+b") as file:
                    file.seek(-8, 2)
                    file.write(bytes(8))
            elif change == "replace":
                other = path.with_suffix(".other")
                other.write_bytes(b"another")
                other.rename(path)
        super().__call__(phase, done, total)

running.Progress = Changing
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return build_inputs(tmp_path_factory.mktemp("inputs"), layers=8)


@pytest.fixture(scope="module")
def nursery() -> Iterator[runs.Nursery]:
    with runs.Nursery() as nursery:
        yield nursery


@pytest.fixture
def copied(inputs: Inputs, tmp_path: Path) -> Inputs:
    shutil.copytree(inputs.teacher, tmp_path / "teacher")
    return Inputs(tmp_path / "teacher", inputs.student, inputs.seeds)


class Command:
    """Runs `pkt extract`, and changes the teacher's file while it reads."""

    def __init__(self, nursery: runs.Nursery) -> None:
        self._nursery = nursery

    def __call__(self, inputs: Inputs, out: Path, change: str, io: str) -> Result:
        words = [change, inputs.teacher / "model.safetensors", "extract", *inputs.options()]
        few = ["-o", out, "--rank", 2, "--limit", 2, "--targets", "q", "--io", io]
        return Result(*self._nursery.program(SCRIPT, *words, *few))


@pytest.fixture(scope="module")
def extract(nursery: runs.Nursery) -> Command:
    return Command(nursery)


@pytest.mark.parametrize("io", ["mmap", "buffered", "direct"])
def test_a_teacher_cut_short_in_the_middle(
    copied: Inputs, tmp_path: Path, io: str, extract: Command
) -> None:
    file = copied.teacher / "model.safetensors"
    size = file.stat().st_size
    ended = extract(copied, tmp_path / "out", "cut", io)
    assert ended.code == 1
    assert ended.error == f"{file}: expected {size} bytes, found 5000 bytes"
    assert "Traceback" not in ended.err


def test_a_teacher_written_to_and_put_back(
    inputs: Inputs, copied: Inputs, tmp_path: Path, extract: Command
) -> None:
    out, file = tmp_path / "out", copied.teacher / "model.safetensors"
    ended = extract(copied, out, "write", "mmap")
    assert ended.code == 1
    assert ended.error.startswith(f"{file}: ")
    assert "written to since it was opened" in ended.error

    # What is there now is another teacher with the same headers: not to be continued with.
    ended = extract(copied, out, "nothing", "mmap")
    assert ended.code == 1
    assert "changed: weights.model.safetensors" in ended.error

    shutil.copy2(inputs.teacher / "model.safetensors", file)
    assert extract(copied, out, "nothing", "mmap").code == 0
    assert extract(copied, tmp_path / "at once", "nothing", "buffered").code == 0
    assert result_bytes(out) == result_bytes(tmp_path / "at once")


def test_a_teacher_that_another_file_is_renamed_over(
    copied: Inputs, tmp_path: Path, extract: Command
) -> None:
    """The files that were opened are read to their end, whatever their names now mean."""
    assert extract(copied, tmp_path / "before", "nothing", "mmap").code == 0
    assert extract(copied, tmp_path / "out", "replace", "mmap").code == 0
    assert (copied.teacher / "model.safetensors").read_bytes() == b"another"
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "before")
