"""The child's side: leaving the host behind, step by step, and becoming the program.

Either through namespaces::

    supervisor ─fork→ waiter (outside) ─unshare, fork→ init (pid 1) ─fork→ program

or, where the host gives no namespaces, as an unprivileged uid under Landlock::

    supervisor ─fork→ waiter ─fork→ program

The waiter or init reports how the program ended over a socket that the program does not have.
Nothing here returns: each process ends by `os._exit` or becomes another program.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import resource
import signal
import socket
from typing import NoReturn

from pkt.sandbox import kernel
from pkt.sandbox.job import Job

INSIDE = 1000  # uid and gid of the program in a user namespace
_NAMESPACES = (
    kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SYSTEM = (
    "/lib", "/lib32", "/lib64", "/libx32", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32",
    "/usr/local/lib", "/usr/local/lib64", "/usr/share/zoneinfo", "/nix/store", "/gnu/store",
    "/etc/ld.so.cache",
)  # fmt: skip
_PLACES = ("/sys", "/mnt", "/media", "/srv", "/proc")  # one of them carries the new root


def enter(job: Job, pipes: dict[int, int], control: socket.socket) -> NoReturn:
    """Become the waiter.

    Args:
        job: what to run, and how.
        pipes: the program's file descriptor → ours.
        control: says ``unshared`` and waits for ``go`` (uid maps and cgroup are set by then);
            says ``status N`` (as of waitpid) or ``error TEXT``.

    """
    try:
        kernel.die_with_parent(signal.SIGKILL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when the host runs out of memory, this goes first
        if job.mode != "uid":
            kernel.unshare(_NAMESPACES | (kernel.NEWUSER if job.mode == "user" else 0))
        control.sendall(b"unshared\n")
        if control.recv(16) != b"go\n":
            os._exit(1)
        if job.mode != "uid":
            init = os.fork()
            if init:
                control.sendall(f"init {init}\n".encode())
                control.close()
                _close(pipes)
                os.waitpid(init, 0)
                os._exit(0)
            kernel.die_with_parent(signal.SIGKILL)
            kernel.hide_memory()
            if control.recv(16) != b"go\n":
                os._exit(1)
            _build_root(job)
        _wait_for_program(job, pipes, control)
    except BaseException as error:
        _fail(control, error)


def _close(pipes: dict[int, int]) -> None:
    for descriptor in {*pipes.values()}:
        os.close(descriptor)


def _fail(control: socket.socket, error: BaseException) -> NoReturn:
    with contextlib.suppress(OSError):
        text = error.strerror or str(error) if isinstance(error, OSError) else repr(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{text} ({error.filename})"
        control.sendall(f"error {text}\n".encode())
    os._exit(1)


def _wait_for_program(job: Job, pipes: dict[int, int], control: socket.socket) -> NoReturn:
    """Reap whatever ends until the program does; as pid 1 the end of this ends all the rest."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program = os.fork()
    if not program:
        _become_program(job, pipes, control)
    _close(pipes)
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == program:
            control.sendall(f"status {status}\n".encode())
            os._exit(0)


def _become_program(job: Job, pipes: dict[int, int], control: socket.socket) -> NoReturn:
    try:
        os.setsid()
        os.umask(0o077)
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(job.folder)
        _redirect(pipes)
        _set_limits(job)
        _drop_privileges(job)
        kernel.die_with_parent(signal.SIGKILL)
        if job.mode == "uid":
            kernel.confine_files(readable(job), job.folder)
        if kernel.can_filter():
            kernel.filter_system_calls()
        os.execve(job.python, [job.python, "-S", "-s", "-P", "-c", job.harness], job.environment)
    except BaseException as error:
        _fail(control, error)


def _redirect(pipes: dict[int, int]) -> None:
    """Give the program its pipes as the numbers asked for, /dev/null as input, and no more.

    What else is open is closed by the exec, because Python opens nothing inheritable.
    """
    pipes = {0: os.open(os.devnull, os.O_RDONLY), **pipes}
    above = max(pipes) + 1  # first out of the way: ours may have the numbers that are asked for
    held = {want: fcntl.fcntl(have, fcntl.F_DUPFD_CLOEXEC, above) for want, have in pipes.items()}
    for want, have in held.items():
        os.dup2(have, want)


def _set_limits(job: Job) -> None:
    for kind, value in (
        (resource.RLIMIT_AS, job.memory_bytes),
        (resource.RLIMIT_NPROC, job.processes + job.other_processes),
        (resource.RLIMIT_FSIZE, job.file_bytes),
        (resource.RLIMIT_CORE, 1),  # the one value that also keeps the host's dump handler away
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_STACK, 8 << 20),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _set_limit(kind, value, value)
    seconds = math.ceil(job.seconds)
    _set_limit(resource.RLIMIT_CPU, seconds, seconds + 1)  # SIGXCPU first, which tells why


def _set_limit(kind: int, soft: int, hard: int) -> None:
    _, old = resource.getrlimit(kind)
    if old != resource.RLIM_INFINITY:
        soft, hard = min(soft, old), min(hard, old)
    resource.setrlimit(kind, (soft, hard))


def _drop_privileges(job: Job) -> None:
    kernel.drop_bounding_set()
    if job.uid:
        os.setgroups([])
    identity = INSIDE if job.mode == "user" else job.uid
    os.setresgid(identity, identity, identity)
    os.setresuid(identity, identity, identity)
    kernel.drop_capabilities()


def _build_root(job: Job) -> None:
    """A root of its own: libraries and devices read-only, one small folder in memory to write to.

    There is no /proc, /sys, /home or /etc in it, and no program but the interpreter.
    """
    root = next(place for place in _PLACES if os.path.isdir(place))
    kernel.mount(None, "/", None, kernel.PRIVATE | kernel.REC)
    shut = kernel.NOSUID | kernel.NODEV
    kernel.mount("pkt", root, "tmpfs", shut, "size=1m,nr_inodes=4096,mode=755")
    owner = INSIDE if job.mode == "user" else job.uid
    limits = f"size={job.file_bytes},nr_inodes=4096,mode=700,uid={owner},gid={owner}"
    own = root + job.folder
    os.mkdir(own)
    kernel.mount("pkt", own, "tmpfs", shut | kernel.NOEXEC, limits)
    for path in readable(job):  # some may lie below the folder that ours hides
        _show(path, root)
    for path in _mounts_below(root):
        if path != own:
            flags = kernel.mount_flags(path) | kernel.NOSUID | kernel.RDONLY
            kernel.mount(None, path, None, flags | kernel.REMOUNT | kernel.BIND)
    kernel.change_root(root)
    kernel.mount(None, "/", None, kernel.REMOUNT | kernel.BIND | kernel.RDONLY | shut)


def _show(path: str, root: str) -> None:
    """Bind a path of the host at the same place under the new root, or copy a link."""
    target = root + path
    if not os.path.exists(path) or os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    kernel.mount(path, target, None, kernel.BIND | kernel.REC)


def _mounts_below(root: str) -> list[str]:
    r"""Where something is mounted on the topmost mount of `root`, or on that in turn.

    A line of mountinfo holds id, parent's id, device, source and place, blanks written ``\040``.
    """
    with open("/proc/self/mountinfo", "rb") as file:
        lines = [line.split()[:5] for line in file]
    inside = {[one for one, _, _, _, place in lines if place == os.fsencode(root)][-1]}
    found = []
    for one, parent, _, _, place in lines:  # parents come first
        if parent in inside:
            inside.add(one)
            found.append(re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), place))
    return [os.fsdecode(place) for place in found]


def readable(job: Job) -> list[str]:
    """Every path that the program may read: the system's libraries and its interpreter."""
    return [*_SYSTEM, *_DEVICES, *job.libraries, job.python]
