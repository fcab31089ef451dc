"""Extractions for the tests: quick ones in this process, and ones in processes that may be killed.

Drawing the report takes most of a tiny run's seconds, so `pictureless` puts a digest of everything
that the report would be drawn from into its place. A `Nursery` is a process that has imported all
that an extraction needs and forks one child for each: a child starts at once, has thread pools of
its own and may be killed at any moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pkt
from pkt.api import execute, prepare
from pkt.errors import PktError

RUN_RECORD = "pkt_run.json"  # the one file of OUT that may differ between two equal runs


def digest_report(
    folder: Path,
    manifest: Mapping[str, Any],
    heat: Mapping[str, Any],
    spectra: Mapping[str, Sequence[float]],
    energy: Mapping[str, float] | None = None,
) -> Path:
    """In place of `pkt.report.write_report`: the hash of what it is given."""
    digest = hashlib.sha256()
    for key in sorted(heat):
        digest.update(f"{key} {heat[key].rows} {heat[key].cols} {heat[key].bins.shape}".encode())
        digest.update(heat[key].bins.tobytes())
    digest.update(json.dumps([manifest, dict(spectra), energy], sort_keys=True).encode())
    folder.mkdir(exist_ok=True)
    page = folder / "index.html"
    page.write_text(digest.hexdigest())
    return page


@contextmanager
def pictureless() -> Iterator[None]:
    """Extractions inside the block draw no pictures."""
    with mock.patch("pkt.methods.seeking.write_report", digest_report):
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` that must be the same for the same input, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != RUN_RECORD
    }


class Nursery:
    """Runs `pkt.extract` or `pkt.train` in forked processes, one at a time, in a with block."""

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


def _obey(order: Mapping[str, Any]) -> tuple[int, str]:
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
