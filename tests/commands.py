"""Running `pkt` in this process, and the small inputs that its tests share."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import tiny
from pkt.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what went wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("pkt: error: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("pkt: error: ")

    @property
    def hint(self) -> str:
        return next(
            line.removeprefix("hint: ")
            for line in self.err.splitlines()
            if line.startswith("hint: ")
        )


def pkt(*arguments: object) -> Result:
    """What the command prints, and the code it exits with."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Result(code, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Inputs:
    teacher: Path
    student: Path
    seeds: Path

    def options(self, **replaced: object) -> list[object]:
        """`--teacher … --student … --seeds …`, some of them replaced."""
        given = {"teacher": self.teacher, "student": self.student, "seeds": self.seeds} | replaced
        return [word for name, value in given.items() for word in (f"--{name}", value)]


def build_inputs(folder: Path, *, layers: int | None = None, seeds: int = 4) -> Inputs:
    """A tiny Llama teacher and student of one tokenizer, and texts."""
    inputs = Inputs(folder / "teacher", folder / "student", folder / "seeds.jsonl")
    tiny.build("llama", inputs.teacher, "teacher", vocab=128, layers=layers)
    tiny.build("llama", inputs.student, "student", vocab=128, seed=1)
    for model in (inputs.teacher, inputs.student):
        tiny.write_tokenizer(model, 128)
    write_seeds(inputs.seeds, [{"text": f"tag {i} big dog and kid {i * i}"} for i in range(seeds)])
    return inputs


def write_seeds(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def result_bytes(out: Path) -> dict[str, bytes]:
    """Every file of a result but the one that tells the time."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "pkt_run.json"
    }
