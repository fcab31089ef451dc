"""Memory of a group of processes: bounded by a cgroup where one can be made, else added up."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from typing import NamedTuple

_ROOT = "/sys/fs/cgroup"


class MemoryGroup(NamedTuple):
    """A cgroup (v1 or v2) of our own that bounds anonymous memory, files in memory and caches."""

    folder: str
    version: int

    @classmethod
    def make(cls, memory_bytes: int) -> MemoryGroup | None:
        """A new group below our own (v2: or beside it), or None where that is not allowed."""
        for folder, version in _candidates():
            group = cls(os.path.join(folder, f"pkt-{secrets.token_hex(8)}"), version)
            try:
                os.mkdir(group.folder)
            except OSError:
                continue
            try:
                group._bound(memory_bytes)
            except OSError:
                group.remove()
                continue
            return group
        return None

    def _bound(self, memory_bytes: int) -> None:
        if self.version == 1:
            self._write("memory.limit_in_bytes", memory_bytes)
            with contextlib.suppress(OSError):  # not there where swap is not counted
                self._write("memory.memsw.limit_in_bytes", memory_bytes)
        else:
            self._write("memory.max", memory_bytes)
            with contextlib.suppress(OSError):
                self._write("memory.swap.max", 0)
                self._write("memory.oom.group", 1)

    def add(self, process: int) -> None:
        """Move a process, and whatever it starts from then on, into the group."""
        self._write("cgroup.procs", process)

    def exhausted(self) -> bool:
        """Whether the kernel has ended a process because the group's memory was full."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        text = read(f"{self.folder}/{name}")
        counts = dict(line.split() for line in text.splitlines())
        return int(counts.get("oom_kill", 0)) > 0

    def remove(self) -> None:
        """Remove the group, whose processes have ended: the kernel needs a moment to see that."""
        for _ in range(100):
            try:
                os.rmdir(self.folder)
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.01)
            else:
                return

    def _write(self, name: str, value: int) -> None:
        # never created: a folder without this file belongs to no memory controller
        place = os.open(f"{self.folder}/{name}", os.O_WRONLY)
        try:
            os.write(place, str(value).encode())
        finally:
            os.close(place)


def _candidates() -> Iterator[tuple[str, int]]:
    for line in read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield f"{_ROOT}/memory{path}", 1
        elif number == "0":
            yield f"{_ROOT}{path}", 2
            if path != "/":  # a group that holds processes gives its children no controller
                yield f"{_ROOT}{os.path.dirname(path)}", 2


def memory_of_descendants(process: int) -> int:
    """Bytes of memory held by what a process has started, shared pages counted each time."""
    total, waiting = 0, _children(process)
    while waiting:
        one = waiting.pop()
        for line in read(f"/proc/{one}/status").splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) << 10
        waiting += _children(one)
    return total


def _children(process: int) -> list[int]:
    try:
        threads = os.listdir(f"/proc/{process}/task")
    except OSError:
        return []  # it has ended
    lists = [read(f"/proc/{process}/task/{thread}/children") for thread in threads]
    return [int(child) for children in lists for child in children.split()]


def read(path: str) -> str:
    """The text of a kernel file, empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
