"""The supervisor of one program: a process of its own, outside of the sandbox.

Reads a `Job` from its standard input, starts the program through `confinement`, watches the clock,
the output and the memory, ends everything, and writes one JSON object to its standard output:
``{"passed": bool, "reason": str, "bounds": [str]}``, or ``{"error": str}`` where the sandbox itself
failed. The end of its standard input is the end of the parent: then everything is ended too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import select
import signal
import socket
import sys
import tempfile
import time

from pkt.sandbox import confinement, kernel
from pkt.sandbox.cgroup import MemoryGroup, memory_of_descendants, read
from pkt.sandbox.job import INSIDE_FOLDER, Job, encode

_START_SECONDS = 60.0  # for namespaces and interpreter, on a busy machine
_WATCH_SECONDS = 0.05
_FREE_UIDS = range(1_900_000_000, 2_000_000_000)  # beyond what hosts give to users
_RESULT_BYTES = 4096


class SandboxError(Exception):
    """The sandbox, not the program, failed."""


def main() -> None:
    """Serve one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _interrupt)
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    job = Job(**json.loads(sys.stdin.buffer.read(size)))
    try:
        answer = run(job)
    except (SandboxError, OSError) as error:
        answer = {"error": str(error)}
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(encode(answer))
        sys.stdout.buffer.flush()


def _interrupt(_number: int, _frame: object) -> None:
    raise SandboxError("it was stopped")


def run(job: Job) -> dict[str, object]:
    """Run the program to its end, or end it."""
    kernel.adopt_orphans()
    uid = other_uid()
    if job.mode != "user" and not uid:
        raise SandboxError("no other uid to run as: CAP_SETUID and CAP_SETGID are missing")
    if job.mode == "uid":
        _check_landlock()
    elif not uid and _is_host_root():
        raise SandboxError("root without CAP_SETUID: the kernel would not limit its processes")
    group = MemoryGroup.make(job.memory_bytes)
    folder = INSIDE_FOLDER
    try:
        if job.mode == "uid":
            folder = tempfile.mkdtemp(prefix="pkt-sandbox-", dir=job.temporary)
            os.chown(folder, uid, uid)
        others = 0 if uid else _counted_with_us()
        job = job._replace(uid=uid, other_processes=others, folder=folder)
        supervision = Supervision(job, group)
        try:
            supervision.watch()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            supervision.end()
        return supervision.answer()
    finally:
        if group:
            group.remove()
        if folder != INSIDE_FOLDER:
            _remove(folder)


def other_uid() -> int:
    """A uid that nobody has and that we may become, 0 where there is none."""
    if not {kernel.CAP_SETUID, kernel.CAP_SETGID} <= kernel.capabilities():
        return 0
    for line in read("/proc/self/uid_map").splitlines():
        first, _, count = (int(word) for word in line.split())
        if first <= _FREE_UIDS[0] and _FREE_UIDS[-1] < first + count:
            return secrets.choice(_FREE_UIDS)
        if count > 2000:  # a container's share: its upper half, but not nobody's
            return first + count - 10 - secrets.randbelow(count // 2)
    return 0


def _is_host_root() -> bool:
    return os.geteuid() == 0 and read("/proc/self/uid_map").split()[1:2] == ["0"]


def _counted_with_us() -> int:
    """Processes that RLIMIT_NPROC counts beside the program's, if it runs under our own uid.

    Since Linux 5.14 a user namespace counts its own: the waiter and init. Before, the kernel
    counted all tasks of the user.
    """
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    if version and (int(version[1]), int(version[2])) >= (5, 14):
        return 2
    return 2 + sum(
        len(os.listdir(f"/proc/{name}/task"))
        for name in os.listdir("/proc")
        if name.isdigit() and os.path.exists(f"/proc/{name}/task")
        and os.stat(f"/proc/{name}").st_uid == os.geteuid()
    )  # fmt: skip


def _check_landlock() -> None:
    if kernel.CAP_KILL not in kernel.capabilities():
        raise SandboxError("CAP_KILL is missing")
    if not kernel.can_filter():
        raise SandboxError(f"system calls of {os.uname().machine} cannot be filtered")
    found = kernel.landlock_version()
    if found < 3:
        raise SandboxError(f"Landlock 3 (Linux 6.2) keeps files safe there; found {found}")


class Supervision:
    """The life of one program, seen from outside."""

    def __init__(self, job: Job, group: MemoryGroup | None) -> None:
        self._job, self._group = job, group
        self._token = secrets.token_hex(16).encode()
        self._result = b""
        self._heard = b""
        self._output_bytes = 0
        self._init = 0
        self._status: int | None = None
        self._stopped = ""  # why we ended the program
        self._error = ""  # why it did not begin
        text = os.memfd_create("program")
        with open(text, "wb", closefd=False) as file:
            file.write(self._token + b"\n" + job.program.encode("utf-8", "surrogatepass"))
        os.lseek(text, 0, os.SEEK_SET)
        self._result_end, result = os.pipe()
        self._output_end, output = os.pipe()
        self._control, control = socket.socketpair()
        self._waiter = os.fork()
        if not self._waiter:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._control.close()
            os.close(self._result_end)
            os.close(self._output_end)
            confinement.enter(job, {1: output, 2: output, 3: result, 4: text}, control)
        for descriptor in (text, result, output):
            os.close(descriptor)
        control.close()

    def watch(self) -> None:
        """Return when the program has ended or has to be ended."""
        deadline, started = time.monotonic() + _START_SECONDS, False
        hear = {
            0: self._hear_parent,
            self._control.fileno(): self._hear_control,
            self._result_end: self._hear_result,
            self._output_end: self._hear_output,
        }
        poll = select.poll()
        for place in hear:
            poll.register(place, select.POLLIN)
        while self._status is None and not self._stopped and not self._error:
            left = deadline - time.monotonic()
            if left <= 0 and started:
                self._stopped = self._late()
            elif left <= 0:
                self._error = f"no program started within {_START_SECONDS:g} s"
            if self._look_around():
                left = min(left, _WATCH_SECONDS)
            for place, _ in poll.poll(max(0, left) * 1000):
                if not hear[place]():
                    poll.unregister(place)
            if self._result and not started:
                deadline, started = time.monotonic() + self._job.seconds, True

    def _look_around(self) -> bool:
        """Add up what the kernel does not bound here; says whether there is such a thing."""
        if not self._group and memory_of_descendants(os.getpid()) > self._job.memory_bytes:
            self._stopped = "memory"
        if self._job.mode == "uid" and not _fits(self._job.folder, self._job.file_bytes):
            self._stopped = f"files over {self._job.file_bytes} bytes"
        return not self._group or self._job.mode == "uid"

    def end(self) -> None:
        """End every process of the sandbox, and see that it is gone."""
        self._control.close()  # an init that has not begun yet ends by this
        os.kill(self._waiter, signal.SIGKILL)
        os.waitpid(self._waiter, 0)
        with contextlib.suppress(ChildProcessError):  # raised when nobody is left
            if self._init and os.waitpid(self._init, os.WNOHANG)[0] == 0:
                os.kill(self._init, signal.SIGKILL)
            while True:
                if self._job.mode == "uid":
                    self._kill_uid()
                os.waitpid(-1, 0)
        while self._hear_result():
            pass
        while self._hear_output():
            pass

    def answer(self) -> dict[str, object]:
        """What is known at the end."""
        if self._error:
            return {"error": self._error}
        passed, reason = self._verdict()
        bounds = ["memory cgroup" if self._group else "memory watched"]
        if kernel.can_filter():
            bounds.insert(0, "system call filter")
        return {"passed": passed, "reason": reason, "bounds": bounds}

    def _verdict(self) -> tuple[bool, str]:
        code = os.waitstatus_to_exitcode(self._status) if self._status is not None else None
        result = self._result[1:]
        if not self._stopped and result == self._token and code == 0:
            return True, "passed"
        if self._group and self._group.exhausted():
            return False, "memory"
        if self._stopped:
            return False, self._stopped
        if code == -signal.SIGXCPU:
            return False, self._late()
        if result and code == 1:
            text = result.decode("utf-8", "replace").replace(self._token.decode(), "")
            line = "".join(one if one.isprintable() else " " for one in text)[:200].strip()
            return False, line if line != "passed" else "forged result"
        if code is not None and code < 0:
            return False, f"killed by signal {-code}"
        return False, f"exit code {code}"

    def _late(self) -> str:
        return f"timed out after {self._job.seconds:g} s"

    def _hear_parent(self) -> bool:
        self._stopped = self._stopped or "the parent ended"
        return False

    def _hear_result(self) -> bool:
        data = os.read(self._result_end, _RESULT_BYTES)
        self._result += data[: _RESULT_BYTES - len(self._result)]
        if len(self._result) == _RESULT_BYTES:
            self._stopped = self._stopped or "output to the harness"
        return bool(data)

    def _hear_output(self) -> bool:
        data = os.read(self._output_end, 1 << 16)
        self._output_bytes += len(data)
        if self._output_bytes > self._job.output_bytes:
            self._stopped = self._stopped or f"output over {self._job.output_bytes} bytes"
        return bool(data)

    def _hear_control(self) -> bool:
        data = self._control.recv(4096)
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode("utf-8", "replace").partition(" ")
            if word == "unshared":
                self._admit()
            elif word == "init":
                self._init = int(rest)
                self._control.sendall(b"go\n")
            elif word == "status":
                self._status = int(rest)
            else:
                self._error = rest
        if not data and self._status is None:
            self._stopped = self._stopped or "killed from outside"
        return bool(data)

    def _admit(self) -> None:
        """Set what has to be set from outside: the group, and who is who in the user namespace."""
        if self._group:
            self._group.add(self._waiter)
        if self._job.mode == "user":
            inside, folder = confinement.INSIDE, f"/proc/{self._waiter}"
            if self._job.uid:
                ids = groups = f"0 {os.geteuid()} 1\n{inside} {self._job.uid} 1\n"
                groups = f"0 {os.getegid()} 1\n{inside} {self._job.uid} 1\n"
            else:
                ids, groups = f"{inside} {os.geteuid()} 1\n", f"{inside} {os.getegid()} 1\n"
                _write(f"{folder}/setgroups", "deny")
            _write(f"{folder}/uid_map", ids)
            _write(f"{folder}/gid_map", groups)
        self._control.sendall(b"go\n")

    def _kill_uid(self) -> None:
        killer = os.fork()
        if not killer:
            with contextlib.suppress(OSError):
                os.setresuid(self._job.uid, self._job.uid, self._job.uid)
                os.kill(-1, signal.SIGKILL)
            os._exit(0)
        os.waitpid(killer, 0)


def _fits(folder: str, most_bytes: int) -> bool:
    """Whether a folder's files hold so much and number 4096 at most."""
    total, count, waiting = 0, 0, [folder]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    count += 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return False
        if total > most_bytes or count > 4096:
            return False
    return True


def _remove(folder: str) -> None:
    """Remove a folder, however deep it was made: folders within folders are moved up first."""
    serial = 0
    while entries := list(os.scandir(folder)):
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    serial += 1
                    os.rename(inner.path, f"{folder}/{serial}-{secrets.token_hex(8)}")
                else:
                    os.unlink(inner.path)
            os.rmdir(entry.path)
    os.rmdir(folder)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
