"""Extractions for the tests: quick ones in this process, and ones in processes that may be killed.

Drawing takes most of a tiny extraction's seconds, so `pictureless`, which holds in all tests but
those that ask for the fixture ``pictures``, puts a digest of everything that pictures would be
drawn from into their place. A `Nursery` is a process that has imported all that an extraction needs
and forks one child for each: a child starts at once, has thread pools of its own and may be killed
at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pkt
from pkt.api import execute, prepare
from pkt.errors import PktError
from pkt.records import Heat
from pkt.report import pictures

RUN_RECORD = "pkt_run.json"  # the one file of OUT that may differ between two equal runs


def digest_pictures(
    manifest: Mapping[str, Any],
    heat: Mapping[str, Heat],
    spectra: Mapping[str, Sequence[float]],
    energy: Mapping[str, float],
) -> dict[str, bytes]:
    """In place of an extraction's pictures: one that is the hash of what they are drawn from."""
    digest = hashlib.sha256()
    for key in sorted(heat):
        digest.update(f"{key} {heat[key].rows} {heat[key].cols} {heat[key].bins.shape}".encode())
        digest.update(heat[key].bins.tobytes())
    digest.update(json.dumps([manifest, dict(spectra), energy], sort_keys=True).encode())
    return {"digest.png": digest.digest()}


@contextmanager
def pictureless() -> Iterator[None]:
    """Extractions inside the block draw no pictures."""
    with mock.patch("pkt.report.draw", digest_pictures):
        yield


@contextmanager
def with_pictures() -> Iterator[None]:
    """Extractions inside the block draw theirs, as they do for users."""
    with mock.patch("pkt.report.draw", pictures.draw):
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` that must be the same for the same input, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RUN_RECORD
    }


class Nursery:
    """Runs `pkt.extract`, `pkt.train` or a program in forked processes, one at a time."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()  # the end of its input ends the process
        self._process.wait(timeout=60)

    def start(
        self,
        *paths: Path,
        env: Mapping[str, str] | None = None,
        call: str = "extract",
        **options: Any,
    ) -> int:
        """Begin ``pkt.extract(*paths, **options)``; `finish` must follow. Returns its process."""
        assert self._process.stdin
        order = {
            "call": call,
            "paths": [str(path) for path in paths],
            "env": dict(env or {}),
            "options": options,
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def finish(self) -> tuple[int, str]:
        """Exit code of the process begun last (-9 if it was killed), and what it said."""
        code, text = json.loads(self._line())
        return code, text

    def run(self, *paths: Path, **options: Any) -> tuple[int, str]:
        """`start` and `finish`."""
        self.start(*paths, **options)
        return self.finish()

    def program(self, source: str, *words: object) -> tuple[int, str, str]:
        """Exit code and what it prints of ``python -c source words…``, pictures and all."""
        assert self._process.stdin
        order = {"source": source, "words": [str(word) for word in words]}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._line()
        code, text = self.finish()
        out, err = json.loads(text) if text else ("", "")
        return code, out, err

    def _line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def _serve() -> None:
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pkt.api
    import pkt.methods.seeking
    import pkt.methods.tuning  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            os.close(ours)
            code, text = _obey(json.loads(line))
            os.write(theirs, text.encode())
            os._exit(code)
        os.close(theirs)
        print(child, flush=True)
        with os.fdopen(ours) as pipe:
            text = pipe.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), text]), flush=True)


def _made(call: str, paths: Sequence[str], options: dict[str, Any]) -> Any:
    """What `pkt.extract` or `pkt.train` returns; ``plan`` replaces fields of the plan."""
    plan = options.pop("plan", None)
    if plan is None:
        return getattr(pkt, call)(*paths, **options)
    task = prepare(*paths[:-1], **options)
    return execute(replace(task, plan=replace(task.plan, **plan)), Path(paths[-1]))


def _run_program(source: str, words: Sequence[str]) -> tuple[int, str]:
    """Exit code, and as JSON what went to stdout and to stderr."""
    code, sys.argv = 0, ["-c", *words]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        printed = []
        for file in (out, err):
            file.seek(0)
            printed.append(file.read())
        return code, json.dumps(printed)


def _obey(order: Mapping[str, Any]) -> tuple[int, str]:
    if "source" in order:
        return _run_program(order["source"], order["words"])
    os.environ.update(order["env"])
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    try:
        with pictureless():
            made = _made(order["call"], order["paths"], dict(order["options"]))
        return 0, json.dumps(dict(made.run))
    except PktError as error:
        return error.exit_code, str(error)
    except BaseException as error:
        return 99, repr(error)


if __name__ == "__main__":
    _serve()
