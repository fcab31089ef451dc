"""How fast files are read, cold: plain parallel reads, and the three modes of the core's reader."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pkt.checkpoint import Checkpoint
from pkt.config import MIB, READ_THREADS, format_bytes
from pkt.disk import (
    MODES,
    STRETCH_BYTES,
    Files,
    Rate,
    Read,
    held,
    measure,
    on_disk,
    pages,
    raw_reading,
    reading,
    takes_direct,
)
from pkt.errors import OutputError, PktError
from pkt.host import in_memory
from pkt.workplace import free_bytes

ROUNDS = 6  # stretches for each way to read
SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ReadRates:
    """The rate of each way to read: "raw buffered", "raw direct", and the reader's modes."""

    rates: Mapping[str, Rate]

    @property
    def best_raw(self) -> float:
        """GB/s of the faster plain parallel read."""
        raw = (rate for name, rate in self.rates.items() if name.startswith("raw"))
        return max(rate.gigabytes_per_second for rate in raw)

    def share(self, name: str) -> float:
        """The rate of ``name`` as a share of the best plain read."""
        best = self.best_raw
        return self.rates[name].gigabytes_per_second / best if best else 0.0


def bench_read(files: Files, rounds: int = ROUNDS, seconds: float = SECONDS) -> ReadRates:
    """Read stretches of ``files``, which hold data, by turns in every way that is to be had."""
    size = min(STRETCH_BYTES, max(end - begin for _, begin, end in held(files)))
    memory = pages(size)
    direct = takes_direct(files)
    with ThreadPoolExecutor(READ_THREADS, "pkt-raw") as pool:
        reads: dict[str, Read] = {"raw buffered": raw_reading(files, False, memory, pool)}
        if direct:
            reads["raw direct"] = raw_reading(files, True, memory, pool)
        for mode in MODES:
            if mode != "direct" or direct:
                reads[mode] = reading(files, mode, memory)
        return ReadRates(measure(files, reads, size, rounds, seconds))


def files_of(checkpoint: Checkpoint) -> Files:
    """The files of a checkpoint, if there is anything in them to read.

    Raises:
        PktError: no layer is there, only its place: a sparse file.

    """
    if not any(on_disk(checkpoint)):
        raise PktError(
            f"{checkpoint.folder}: expected weights to read, found holes in every layer",
            "leave out --teacher to read a temporary file",
        )
    return checkpoint.files


@contextmanager
def temporary_file(folder: Path | None, size: int) -> Iterator[Files]:
    """A file of ``size`` random bytes on the disk, gone when the block ends.

    Args:
        folder: where; ``None``: as `temporary_folder` says.
        size: bytes; at most half of what is free there.

    Raises:
        OutputError: it cannot be written, or not enough is free.

    """
    where = folder or temporary_folder()
    with ExitStack() as stack:
        try:
            free = free_bytes(where)
            if size > free // 2:
                raise OutputError(
                    f"{where}: {format_bytes(size)} to write, {format_bytes(free)} free; "
                    "at most half of that is taken",
                    "give a smaller --size, or another --folder",
                )
            made = tempfile.TemporaryDirectory(prefix="pkt-bench-", dir=where)
            path = Path(stack.enter_context(made)) / "random"
            _write(path, size)
        except OSError as error:
            raise OutputError(f"{where}: cannot write: {error.strerror}") from error
        yield [(path, size)]


def temporary_folder() -> Path:
    """The system's for temporary files, or /var/tmp where that one is in memory.

    Raises:
        OutputError: both are.

    """
    for where in (Path(tempfile.gettempdir()), Path("/var/tmp")):
        if where.is_dir() and not in_memory(where):
            return where
    raise OutputError(
        f"{tempfile.gettempdir()}: expected a folder on a disk, found one in memory",
        "name one on the disk to measure: --folder DIR",
    )


def _write(path: Path, size: int) -> None:
    """Random bytes, so that no file system compresses them; and on the disk, not in its cache."""
    block = os.urandom(min(size, 16 * MIB))
    with path.open("wb") as file:
        for left in range(size, 0, -len(block)):
            file.write(block[:left])
        file.flush()
        os.fsync(file.fileno())
