"""What the disk gives in each reading mode, measured cold, and the mode that `--io auto` takes.

A measurement reads stretches of the files themselves, spread evenly over them, each in one mode;
what the page cache holds of a stretch is dropped first, and holes of sparse files, which cost no
disk, are left out. Processor seconds are counted beside those of the wall: a copy out of the page
cache takes a core that the sweep could use.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pkt import _core
from pkt.checkpoint import Checkpoint
from pkt.config import MIB, READ_THREADS
from pkt.records import IoMode, Plan, Reading

MODES = ("direct", "buffered", "mmap")
STRETCH_BYTES = 64 * MIB  # read at once: eight threads with a read of 8 MiB each
CHUNK_BYTES = 8 * MIB
ROUNDS = 2  # stretches a mode: 384 MiB in all
SECONDS = 2.0  # a slow disk is not asked further
NEAR_BEST = 1.1  # direct may take so much longer than the best, for it leaves the cores alone

Files = Sequence[tuple[Path, int]]  # path and bytes of each
Pages = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The bytes ``begin`` to ``end`` of one file."""

    file: int
    begin: int
    end: int


@dataclass(slots=True)
class Rate:
    """Bytes read, and the seconds that they took: of the wall, and of processors."""

    bytes: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0

    @property
    def gigabytes_per_second(self) -> float:
        """10⁹ bytes a second; 0 where nothing was read."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


Read = Callable[[Stretch], int]  # into memory; returns the bytes


def choose_io(
    checkpoint: Checkpoint,
    plan: Plan,
    cache_bytes: int,
    *,
    measured: bool = True,
    stretch_bytes: int = STRETCH_BYTES,
) -> Reading:
    """The reading mode of ``--io auto``: measured, unless the page cache can hold everything.

    Args:
        checkpoint: the teacher's.
        plan: of the run.
        cache_bytes: of memory, what its processes leave to the page cache.
        measured: whether files may be read; else the mode is left "auto" where that decides.
        stretch_bytes: read at once by the measurement.

    """
    if checkpoint.bytes + plan.spool_bytes <= cache_bytes:
        purpose = " for the second pass" if plan.passes > 1 else ""
        return Reading("buffered", f"the page cache can hold the checkpoint{purpose}")
    if not measured:
        return Reading("auto", "more than the page cache can hold; measured when a run begins")
    found = measure_modes(checkpoint.files, stretch_bytes)
    rates = {name: rate.gigabytes_per_second for name, rate in found.items() if rate.bytes}
    if not rates:
        reason = "more than the page cache can hold, and too little on the disk to measure"
        return Reading("direct", reason)
    again = 0
    if plan.passes > 1:
        read_twice = checkpoint.layers[: -plan.slots]
        again = sum(sum(p.bytes for p in layer.values()) for layer in read_twice)
    return choose_mode(rates, plan.read_bytes, min(max(0, cache_bytes), again))


def choose_mode(rates: Mapping[str, float], read_bytes: int, cached_bytes: int) -> Reading:
    """The mode that reads the run's bytes soonest; direct also where it takes a tenth longer.

    seconds = bytes from the disk / rate. The page cache keeps what was read last, which the
    backward pass wants first: ``cached_bytes`` cost the disk nothing in any mode but direct.

    Args:
        rates: GB/s of each mode that could be measured; at least one.
        read_bytes: of the whole run.
        cached_bytes: of those, what the page cache will still hold when they are wanted again.

    """
    seconds = {
        mode: (read_bytes - (0 if mode == "direct" else cached_bytes)) / rate / 1e9
        for mode, rate in rates.items()
    }
    best = min(seconds, key=lambda mode: seconds[mode])
    direct = seconds.get("direct", float("inf"))
    if best != "direct" and direct <= NEAR_BEST * seconds[best]:
        return Reading("direct", f"within a tenth of {best}, and it leaves the cores alone", rates)
    reason = "soonest done" if len(rates) > 1 else "the one that was measured"
    if best != "direct" and cached_bytes > 0:
        reason += ", with what the page cache will hold at the turn"
    return Reading(cast(IoMode, best), reason, rates)


def measure_modes(
    files: Files,
    stretch_bytes: int = STRETCH_BYTES,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> dict[str, Rate]:
    """The rate of each reading mode that the file system has, as `measure` finds it."""
    memory = pages(stretch_bytes)
    reads = {
        mode: reading(files, mode, memory)
        for mode in MODES
        if mode != "direct" or takes_direct(files)
    }
    return measure(files, reads, stretch_bytes, rounds, seconds)


def measure(
    files: Files, reads: Mapping[str, Read], stretch_bytes: int, rounds: int, seconds: float
) -> dict[str, Rate]:
    """The rate of each way to read, cold: they take turns, so that all meet the same disk.

    Args:
        files: what is read; each stretch by one way alone as long as there are enough of them.
        reads: by name.
        stretch_bytes: read at once.
        rounds: stretches for each.
        seconds: no further stretch is begun after so long.

    """
    found = {name: Rate() for name in reads}
    chosen = stretches(files, stretch_bytes, rounds * len(reads))
    started = time.perf_counter()
    for turn, name in enumerate([*reads] * rounds if chosen else []):
        if time.perf_counter() - started > seconds:
            break
        stretch, rate = chosen[turn % len(chosen)], found[name]
        drop_cached(files, stretch)
        begun, work = time.perf_counter(), time.process_time()
        rate.bytes += reads[name](stretch)
        rate.seconds += time.perf_counter() - begun
        rate.processor_seconds += time.process_time() - work
    return found


def stretches(files: Files, size: int, count: int) -> list[Stretch]:
    """Up to ``count`` stretches of ``size`` bytes, spread evenly over what lies on the disk."""
    places = [
        Stretch(index, at, at + size)
        for index, first, end in held(files)
        for at in range(first, end - size + 1, size)
    ]
    count = min(count, len(places))
    return [places[(2 * number + 1) * len(places) // (2 * count)] for number in range(count)]


def held(files: Files) -> Iterator[tuple[int, int, int]]:
    """(file, begin, end) of every run of bytes that is no hole, as far as the system can tell."""
    for index, (path, length) in enumerate(files):
        with path.open("rb", buffering=0) as file:
            end = 0
            while end < length:
                try:
                    begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
                    end = min(length, os.lseek(file.fileno(), begin, os.SEEK_HOLE))
                except OSError as error:
                    if error.errno == errno.ENXIO:  # a hole to the end
                        break
                    begin, end = end, length  # a file system that knows no holes
                yield index, begin, end


def on_disk(checkpoint: Checkpoint) -> list[bool]:
    """Of each layer, whether its largest tensor is there: no part of it is a hole."""
    runs = list(held(checkpoint.files))
    largest = [max(layer.values(), key=lambda piece: piece.bytes) for layer in checkpoint.layers]
    return [
        any(
            file == piece.shard and begin <= piece.begin and piece.end <= end
            for file, begin, end in runs
        )
        for piece in largest
    ]


def takes_direct(files: Files) -> bool:
    """Whether every file can be read past the page cache."""
    listed = [(str(path), size) for path, size in files]
    return _core.Reader(listed, "direct", 1).mode == "direct"


def pages(size: int) -> Pages:
    """Memory for ``size`` bytes on whole pages, touched: its page faults are not measured."""
    memory: Pages = np.frombuffer(mmap.mmap(-1, size + 2 * mmap.PAGESIZE), dtype=np.uint8)
    memory.fill(1)
    return memory


def reading(files: Files, mode: str, memory: Pages) -> Read:
    """What reads a stretch into ``memory`` as the stream of an extraction does."""
    reader = _core.Reader([(str(path), size) for path, size in files], mode, READ_THREADS)

    def read(stretch: Stretch) -> int:
        plan = _core.layout([(stretch.file, stretch.begin, stretch.end, 1)])
        reader.read(plan, memory[: plan.bytes])
        return stretch.end - stretch.begin

    return read


def raw_reading(files: Files, direct: bool, memory: Pages, pool: ThreadPoolExecutor) -> Read:
    """What reads a stretch by plain positional reads of 8 MiB in the threads of ``pool``.

    With ``direct`` past the page cache; what is no whole page is then left out.
    """
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    view = memoryview(cast(Any, memory))

    def chunk(descriptor: int, begin: int, size: int, at: int) -> int:
        done = 0
        while done < size:
            count = os.preadv(descriptor, [view[at + done : at + size]], begin + done)
            if count == 0:
                break
            done += count
        return done

    def read(stretch: Stretch) -> int:
        page = mmap.PAGESIZE if direct else 1
        begin, end = -(-stretch.begin // page) * page, stretch.end // page * page
        descriptor = os.open(files[stretch.file][0], flags)
        parts: list[Future[int]] = []
        try:
            parts += [
                pool.submit(chunk, descriptor, at, min(CHUNK_BYTES, end - at), at - begin)
                for at in range(begin, end, CHUNK_BYTES)
            ]
            return sum(part.result() for part in parts)
        finally:
            for part in parts:
                part.cancel()
            wait(parts)
            os.close(descriptor)

    return read


def drop_cached(files: Files, stretch: Stretch) -> None:
    """Ask the page cache to forget a stretch; pages not yet written to the disk stay."""
    with files[stretch.file][0].open("rb", buffering=0) as file:
        size = stretch.end - stretch.begin
        with suppress(OSError):
            os.posix_fadvise(file.fileno(), stretch.begin, size, os.POSIX_FADV_DONTNEED)
