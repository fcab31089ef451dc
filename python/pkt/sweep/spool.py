"""The work folder of a sweep: what each finished layer leaves, whole or not at all.

A tensor file holds one (n_j, D) block a seed, one after another; a JSON file holds a record.
Both are written beside their name, synced, renamed, and the folder synced: a kill at any moment
leaves complete files only. A CRC-32 a block is checked whenever one is read, a SHA-256 with every
record, so damage is noticed, not used. RAM caches these files as the page cache does, which the
kernel takes back when it needs to.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pkt.durable import disk_errors, durable, read_record, write_record
from pkt.errors import OutputError


class DamagedError(OutputError):
    """A tensor file is gone, or not as it was written; it can be made again."""

    def __init__(self, name: str, path: Path, what: str) -> None:
        super().__init__(
            f"{path}: {what}", "run the same command again: damaged work is noticed and done anew"
        )
        self.name = name


class SeedWriter:
    """Writes each seed's block to its place, and notes its checksum."""

    def __init__(self, file: BinaryIO, starts: Sequence[int], row_bytes: int) -> None:
        self._file, self._starts, self._row_bytes = file, starts, row_bytes
        self._sums: dict[int, int] = {}  # CRC-32 of each block so far

    def append(self, block: torch.Tensor) -> None:
        """Write the (n, D) block of the seed behind those that are written already."""
        self.write(len(self._sums), block)

    def write(self, seed: int, block: torch.Tensor) -> None:
        """Write the (n, D) block of ``seed``; seeds may come in any order."""
        data = block.detach().contiguous().cpu().view(torch.uint8).numpy().data
        self._sums[seed] = zlib.crc32(data)
        self._file.seek(self._starts[seed] * self._row_bytes)
        self._file.write(data)

    def sums(self) -> list[int]:
        """Of all blocks, which must have been written."""
        return [self._sums[seed] for seed in range(len(self._starts) - 1)]


class Spool:
    """Tensor files and records of one sweep.

    Args:
        folder: of the records; created if need be; its parent must exist.
        lengths: tokens of each seed.
        width: D, the width of the residual stream.
        dtype: of the blocks.
        tensors: folder of the tensor files, which exists; ``None``: the same.

    """

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        tensors: Path | None = None,
    ) -> None:
        self.folder, self.lengths, self.width, self.dtype = folder, tuple(lengths), width, dtype
        self.tensors = tensors or folder
        self._starts = [0, *itertools.accumulate(lengths)]
        self._sums: dict[str, list[int]] = {}  # read or written by this process
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def writer(self, name: str, *, synced: bool = True) -> Iterator[SeedWriter]:
        """A tensor file under ``name``; it exists once the block ends without an error.

        A file that is not ``synced`` outlives the process, though perhaps not the system.
        """
        with durable(self._path(name), synced=synced) as file:
            writer = SeedWriter(file, self._starts, self.width * self.dtype.itemsize)
            yield writer
            sums = writer.sums()
        write_record(self._sum_path(name), sums, synced=synced)
        self._sums[name] = sums

    def read(self, name: str, seed: int) -> torch.Tensor:
        """Block (n, D) of one seed.

        Raises:
            DamagedError: it is not there, or not the one that was written.

        """
        path = self._path(name)
        if not self.holds(name):
            raise DamagedError(name, path, "it is gone, or not as long as this run wrote it")
        block = torch.empty(self.lengths[seed], self.width, dtype=self.dtype)
        offset = self._starts[seed] * self.width * self.dtype.itemsize
        try:
            with path.open("rb", buffering=0) as file:
                whole = _fill(file, offset, block)
        except FileNotFoundError:
            whole = False
        except OSError as error:
            raise OutputError(f"{path}: cannot read: {error.strerror}") from error
        if not whole or zlib.crc32(_data(block)) != self._sums[name][seed]:
            raise DamagedError(name, path, "its bytes are not the ones that this run wrote")
        return block

    def holds(self, name: str) -> bool:
        """Whether the tensor file is there, as long as it must be; `read` checks its bytes."""
        if name not in self._sums:
            sums = read_record(self._sum_path(name))
            if not isinstance(sums, list) or len(sums) != len(self.lengths):
                return False
            self._sums[name] = sums
        try:
            size = self._path(name).stat().st_size
        except OSError:
            return False
        return size == self._starts[-1] * self.width * self.dtype.itemsize

    @contextlib.contextmanager
    def scratch(self, name: str, rows: int, width: int) -> Iterator[torch.Tensor]:
        """A mapped (rows, width) tensor that is gone when the block ends."""
        path = self.tensors / f"{name}.tmp"
        size = rows * width * self.dtype.itemsize
        with disk_errors(path), path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as SIGBUS
        try:
            mapped = torch.from_file(str(path), shared=True, size=rows * width, dtype=self.dtype)
            yield mapped.view(rows, width)
        finally:
            path.unlink(missing_ok=True)

    def drop(self, name: str) -> None:
        """Remove a tensor file that no later step needs."""
        self._sums.pop(name, None)
        for path in (self._path(name), self._sum_path(name)):
            path.unlink(missing_ok=True)

    def put(self, name: str, record: Any) -> None:
        """Write a JSON record."""
        write_record(self.folder / f"{name}.json", record)

    def forget(self, name: str) -> None:
        """Remove a JSON record."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write raw bytes to ``name.bits``."""
        with durable(self.folder / f"{name}.bits") as file:
            file.write(data)

    def get(self, name: str) -> Any | None:
        """A JSON record; ``None`` if it is missing or damaged."""
        return read_record(self.folder / f"{name}.json")

    def _path(self, name: str) -> Path:
        return self.tensors / f"{name}.bin"

    def _sum_path(self, name: str) -> Path:
        return self.tensors / f"{name}.sum.json"


class Scratch:
    """One tensor a seed in a file that is gone when the layer is done."""

    def __init__(self, path: Path, lengths: Sequence[int], like: torch.Tensor) -> None:
        self._path, self._lengths = path, lengths
        self._width, self._dtype = like.shape[1], like.dtype
        with disk_errors(path):
            self._file = path.open("w+b", buffering=0)

    def write(self, seed: int, block: torch.Tensor) -> None:
        """Store the (n, width) block of ``seed``; writing it again replaces it."""
        data = _data(block.contiguous().cpu())
        with disk_errors(self._path):
            self._file.seek(self._offset(seed))
            done = 0
            while done < len(data):
                done += self._file.write(data[done:]) or 0

    def read(self, seed: int) -> torch.Tensor:
        """The block of ``seed``."""
        block = torch.empty(self._lengths[seed], self._width, dtype=self._dtype)
        if not _fill(self._file, self._offset(seed), block):
            raise OutputError(f"{self._path}: shorter than this run wrote it")
        return block

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _offset(self, seed: int) -> int:
        return sum(self._lengths[:seed]) * self._width * self._dtype.itemsize


def _fill(file: Any, offset: int, block: torch.Tensor) -> bool:
    """Read ``block`` from ``offset`` on; false if the file ends before."""
    data = _data(block)
    file.seek(offset)
    filled = 0
    while filled < len(data):
        count = file.readinto(data[filled:])
        if not count:
            return False
        filled += count
    return True


def _data(block: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor, as a buffer that shares its memory."""
    return block.view(torch.uint8).numpy().reshape(-1).data
