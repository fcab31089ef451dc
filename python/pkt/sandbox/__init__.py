"""Running Python programs that a language model wrote, and saying whether they pass their tests.

Such a program may do anything: loop, fork, fill memory and disk, look around, kill. Each runs in
a process tree of its own that cannot reach the rest of the host (the most that the host allows of
this; see `isolation`)::

    pkt ─spawns→ launcher (supervises) ─forks→ waiter ─forks→ init ─forks→ the program's Python
                 host's side of everything     └── new user, pid, mount, network, ipc, uts ──┘
                                                   and cgroup namespaces

===============  =================================================================================
it cannot …      because
===============  =================================================================================
read or write    its root holds the system's libraries, read-only, and one folder of
files            `file_bytes` in memory; there is no /proc, /home or host's /tmp
reach a network  its network namespace is empty, and sockets are refused
see, signal or   they are not in its pid namespace, tracing is refused, its uid is nobody else's
trace others     (as an unprivileged user: its own user's, inside a namespace of its own)
fork without end RLIMIT_NPROC counts its uid, in its user namespace; that uid is never the host's
                 root, whom the limit does not bind
eat memory       RLIMIT_AS bounds each process; a memory cgroup bounds the sum, its files included,
                 or else the launcher adds up every 0.05 s and ends what is over
run on           the launcher ends it by the clock, and all that it started with it
read secrets     environment, descriptors, arguments and folder are fixed and its own
===============  =================================================================================

Where the host gives no namespaces (a container, say), root can still use an unused uid, Landlock
and the system call filter; the folder then lies in the host's temporary folder, and the launcher
adds up its files as it does memory; there, a program whose launcher is killed by hand may leave
what it forked. Where neither is possible, nothing runs.

A program has passed when its last statement has ended without an exception in the process that
began it, and not before: printing, exiting early or a forked child do not count. The harness then
sends a random token that the program was not given. Harness and program share an interpreter,
though: code that knows this harness can walk the frames to the token, as it could replace the
functions that the tests call. That is cheating made on purpose, and not prevented.

The program's module is called ``program``: what stands under ``if __name__ == "__main__":`` does
not run, as in HumanEval's own harness. The hash seed is fixed: sets keep their order between runs.

Source: the problem format of HumanEval (Chen et al., arXiv 2107.03374, section 2.3 on the sandbox).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt.errors import PktError, UsageError
from pkt.sandbox.job import Job, encode

_FOLDER = Path(__file__).resolve().parent
# The launcher imports three modules of this package, and not the package itself.
_BOOT = """
import sys, types
for name, folder in (("pkt", sys.argv[1]), ("pkt.sandbox", sys.argv[2])):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [folder]
from pkt.sandbox.launcher import main
main()
"""
_SPACES = "pid, mount, network, ipc, uts and cgroup namespaces"
_MODES = {
    "user": f"user, {_SPACES}",
    "root": f"{_SPACES}, an unused uid",
    "uid": "an unused uid, Landlock",
}
_KNOBS = {  # what forbids user namespaces on well-known systems: path, value, remedy
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "/proc/sys/kernel/unprivileged_userns_clone": ("0", "1"),
    "/proc/sys/user/max_user_namespaces": ("0", "10000"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    `seconds` is wall clock from its first statement, and CPU time of each process. `memory_bytes`
    bounds the address space of each process and the memory of all together. `processes` counts
    threads too. `file_bytes` bounds its folder and each file in it.
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    output_bytes: int = 64 << 10

    def __post_init__(self) -> None:
        least = {"seconds": 0.001, "memory_bytes": 64 << 20, "processes": 1, "file_bytes": 1 << 16,
                 "output_bytes": 0}  # fmt: skip
        for name, minimum in least.items():
            if not minimum <= getattr(self, name) < 1 << 60:
                raise UsageError(
                    f"sandbox limit {name}: expected {minimum} or more, found {getattr(self, name)}"
                )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether a program passed, and one line that says why.

    `reason` is ``passed``, an exception (``AssertionError: …``), ``timed out after 10 s``,
    ``memory``, ``output over N bytes``, ``exit code N …`` or ``killed by signal N``.
    """

    passed: bool
    reason: str


Notify = Callable[[str, int, int], None]


def isolation() -> str:
    """What keeps programs apart on this host, in words.

    Raises:
        PktError: the host allows none of the ways; the message says what each of them lacks.

    """
    mode, bounds = _way()
    return ", ".join([_MODES[mode], *bounds])


def run(program: str, limits: Limits = Limits()) -> Outcome:
    """Run one program, its tests included, to its end or to a limit.

    Raises:
        PktError: the host allows no isolation, or the sandbox failed.

    """
    return run_all([program], limits, workers=1)[0]


def run_all(
    programs: Sequence[str],
    limits: Limits = Limits(),
    workers: int | None = None,
    notify: Notify = lambda phase, done, total: None,
) -> list[Outcome]:
    """Run programs, some at a time; the outcomes are in their order.

    Whatever ends this early (an error, Ctrl-C) ends the programs and removes their folders.

    Args:
        programs: Python source texts.
        limits: of each program.
        workers: programs at a time; by default one per core, at most 8.
        notify: told of ("programs", ended, in all).

    Raises:
        UsageError: `workers` below 1.
        PktError: the host allows no isolation, or the sandbox failed.

    """
    if workers is not None and workers < 1:
        raise UsageError(f"workers: expected 1 or more, found {workers}")
    mode, _ = _way()
    count = workers or min(8, len(os.sched_getaffinity(0)))
    launches = [_Launch(_job(program, mode, limits)) for program in programs]
    pool = ThreadPoolExecutor(count, thread_name_prefix="pkt-sandbox")
    try:
        waiting = [pool.submit(launch.answer) for launch in launches]
        for done, future in enumerate(as_completed(waiting)):
            future.result()
            notify("programs", done + 1, len(launches))
        return [_outcome(future.result()) for future in waiting]
    finally:
        for launch in launches:
            launch.stop()
        pool.shutdown(cancel_futures=True)


class _Launch:
    """A launcher, from its start to its end; `stop` may be called from another thread."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def answer(self) -> dict[str, Any]:
        """Its answer; raises `PktError` where the sandbox failed."""
        command = [self._job.python, "-I", "-S", "-c", _BOOT, str(_FOLDER.parent), str(_FOLDER)]
        with self._lock:
            if self._stopped:
                raise PktError("the sandbox was stopped")
            process = self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={}, cwd="/", start_new_session=True, bufsize=0,
            )  # fmt: skip
            assert process.stdin
            assert process.stdout
            assert process.stderr
            _send(process.stdin.fileno(), encode(self._job._asdict()))
        with process.stdout, process.stderr:
            try:
                said = process.stdout.read()
            finally:  # its input ends, so it ends, also where reading was interrupted
                with self._lock:
                    process.stdin.close()
                errors = process.stderr.read()
                code = process.wait()
        return _decoded(said, code, errors)

    def stop(self) -> None:
        """Let it end everything and itself, if it has begun and not ended."""
        with self._lock:
            self._stopped = True
            if self._process and self._process.stdin and not self._process.stdin.closed:
                self._process.terminate()


def _send(place: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(place, data) :]
    except BrokenPipeError:
        pass  # it died: its exit code and errors tell more


def _decoded(said: bytes, code: int, errors: bytes) -> dict[str, Any]:
    size = int.from_bytes(said[:8], "big")
    if code or len(said) < 8 or len(said) != 8 + size:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        raise PktError(f"the sandbox's launcher ended with exit code {code}{last}")
    answer: dict[str, Any] = json.loads(said[8:])
    if "error" in answer:
        raise PktError(f"the sandbox cannot run a program: {answer['error']}")
    return answer


def _outcome(answer: dict[str, Any]) -> Outcome:
    return Outcome(answer["passed"], answer["reason"])


def _way() -> tuple[str, list[str]]:
    """How programs are isolated here, found by running one."""
    return _probe(os.geteuid())


@functools.cache
def _probe(_uid: int) -> tuple[str, list[str]]:
    missing = []
    for mode in _MODES:
        try:
            answer = _Launch(_job("", mode, Limits(seconds=60))).answer()
        except PktError as error:
            missing.append(f"{_MODES[mode]}: {error.message.split(': ', 1)[-1]}")
            continue
        if answer["passed"]:
            return mode, answer["bounds"]
        missing.append(f"{_MODES[mode]}: an empty program ended with {answer['reason']}")
    raise PktError(
        f"this host gives no isolation for programs written by a model: {'; '.join(missing)}",
        hint=_remedy(),
    )


def _remedy() -> str:
    for path, (forbidding, allowing) in _KNOBS.items():
        if Path(path).is_file() and Path(path).read_text().strip() == forbidding:
            name = path.removeprefix("/proc/sys/").replace("/", ".")
            return f"as root: sysctl -w {name}={allowing}"
    return (
        "allow user namespaces, or run as root with CAP_SETUID, CAP_SETGID and CAP_KILL on "
        "Linux 6.2 or later (in a container: its default capabilities, and a seccomp profile "
        "that lets landlock_* through)"
    )


def _job(program: str, mode: str, limits: Limits) -> Job:
    python, libraries = _interpreter()
    return Job(
        program=program,
        mode=mode,
        python=python,
        libraries=libraries,
        harness=(_FOLDER / "harness.py").read_text(encoding="utf-8"),
        seconds=limits.seconds,
        memory_bytes=limits.memory_bytes,
        processes=limits.processes,
        file_bytes=limits.file_bytes,
        output_bytes=limits.output_bytes,
        temporary=tempfile.gettempdir(),
    )


@functools.cache
def _interpreter() -> tuple[str, list[str]]:
    """The Python that programs run on, not a virtual environment's, and what it reads."""
    python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    named = [
        sysconfig.get_path("stdlib"),
        sysconfig.get_config_var("DESTSHARED"),
        sysconfig.get_config_var("LIBDIR"),
        os.path.join(sys.base_exec_prefix, "lib"),
    ]
    found = {path for name in named if name for path in (name, os.path.realpath(name))}
    return python, sorted(path for path in found if os.path.isdir(path))
