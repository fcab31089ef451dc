"""What this host gives the process: memory limits, memory held, and a description of itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_UNLIMITED = 1 << 60


def memory_limit() -> tuple[int, str]:
    """Bytes this process may hold, and where that is written.

    The smallest of what is available (`MemAvailable`) and what the cgroups (v1 and v2) that hold
    the process still allow: their limit, less what other members hold that the kernel cannot take
    back: anonymous memory, and files of file systems in memory, such as /dev/shm.
    """
    candidates = [(_meminfo("MemAvailable"), "MemAvailable")]
    for line in _read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, limit = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            text = _read(str(place / limit)).strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                left = int(text) - max(0, _group_bytes(place) - anonymous_bytes())
                candidates.append((left, f"cgroup {limit}"))
            if place == root:
                break
    return min(candidates)


def in_memory(place: Path) -> bool:
    """Whether the files of the folder ``place`` lie in memory (tmpfs, ramfs), on no disk."""
    device = place.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in _read("/proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == wanted:
            return kind.split()[0] in ("tmpfs", "ramfs")
    return False


def anonymous_bytes() -> int:
    """Anonymous memory of this process: what no file backs and the kernel cannot take back."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def release_free_memory() -> None:
    """Give freed heap pages back to the system (glibc's malloc_trim; nothing elsewhere).

    Tensors of a few MB come from the heap, whose freed pages would otherwise add up, run after
    run, beyond what the plan says.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMeter:
    """The largest `anonymous_bytes` seen, looked at many times a second by a thread."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.peak_bytes = anonymous_bytes()
        self._seconds = seconds
        self._ended = threading.Event()

    @contextlib.contextmanager
    def running(self) -> Iterator[PeakMeter]:
        """Measure while the block runs."""
        thread = threading.Thread(target=self._watch, name="pkt-peak", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._seconds):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def describe() -> dict[str, str | int]:
    """Processor, cores, memory and system, for `pkt_run.json` and `pkt env`."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo").splitlines()
         if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )  # fmt: skip
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _meminfo("MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether torch has fast kernels for bfloat16 products on this processor.

    oneDNN has them for AVX-512, for AVX-NE-CONVERT and on ARM for BF16; read off the processor's
    flags, as torch does, so that a plan needs no torch.
    """
    flags = _processor_flags()
    return {"avx512bw", "avx512vl", "avx512dq"} <= flags or bool({"avx_ne_convert", "bf16"} & flags)


def fuses_in_registers() -> bool:
    """Whether the core's own products are fast: fused multiply-add in registers of 256 bits."""
    return {"avx2", "fma"} <= _processor_flags()


def multiplies_in_registers() -> bool:
    """Whether the core's own products of bfloat16 are the fastest way to weight gradients.

    A processor that multiplies whole tiles of bfloat16 in one instruction (AMX) is left to oneDNN,
    which is many times faster there.
    """
    return fuses_in_registers() and "amx_bf16" not in _processor_flags()


def _processor_flags() -> set[str]:
    """What the first processor can do, in the kernel's words."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith(("flags", "features")):
            return set(line.split(":")[1].split())
    return set()


def _group_bytes(folder: Path) -> int:
    """Memory of all members of a cgroup that no disk backs: anonymous, and files in memory."""
    found = dict(line.split() for line in _read(str(folder / "memory.stat")).splitlines())
    version = ("total_rss", "total_shmem") if "total_rss" in found else ("anon", "shmem")
    return sum(int(found.get(name, 0)) for name in version)


def _meminfo(key: str) -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return _UNLIMITED


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


@dataclass
class Costs:
    """What the run took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under ``name``."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@contextlib.contextmanager
def one_thread(small: bool) -> Iterator[None]:
    """One torch thread in the block if its products are so ``small`` that threads cost more."""
    import torch

    before = torch.get_num_threads()
    if small:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
