"""The work folder of a sweep: what each finished layer leaves, whole or not at all.

A tensor file holds one (n_j, D) block a seed, one after another; a JSON file holds a record.
Both are written beside their name, synced, renamed, and the folder synced: a kill at any moment
leaves complete files only. Every file carries a SHA-256, so damage is noticed, not used. RAM
caches these files as the page cache does, which the kernel takes back when it needs to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pkt.errors import OutputError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path}: the disk is full; finished layers are kept",
                "make room, then run the same command again: it continues where it stopped",
            ) from error
        raise OutputError(f"{path}: cannot write: {error.strerror}") from error


@contextlib.contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is complete and on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            _sync_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


class SeedWriter:
    """Appends each seed's block; the checksum grows with it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def append(self, block: torch.Tensor) -> None:
        """Write one seed's (n, D) block."""
        data = block.detach().contiguous().cpu().view(torch.uint8).numpy().data
        self._hash.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        """Of everything appended so far."""
        return self._hash.hexdigest()


class Spool:
    """Tensor files and records of one sweep.

    Args:
        folder: created if need be; its parent must exist.
        lengths: tokens of each seed.
        width: D, the width of the residual stream.
        dtype: of the blocks.

    """

    def __init__(
        self, folder: Path, lengths: Sequence[int], width: int, dtype: torch.dtype
    ) -> None:
        self.folder, self.lengths, self.width, self.dtype = folder, tuple(lengths), width, dtype
        self._starts = [sum(lengths[:index]) for index in range(len(lengths))]
        self._trusted: set[str] = set()  # written or verified by this process
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def writer(self, name: str) -> Iterator[SeedWriter]:
        """A tensor file under ``name``; it exists once the block ends without an error."""
        with durable(self.folder / f"{name}.bin") as file:
            writer = SeedWriter(file)
            yield writer
        self.put(f"{name}.sum", writer.sha256)
        self._trusted.add(name)

    def read(self, name: str, seed: int) -> torch.Tensor:
        """Block (n, D) of one seed."""
        block = torch.empty(self.lengths[seed], self.width, dtype=self.dtype)
        offset = self._starts[seed] * self.width * self.dtype.itemsize
        path = self.folder / f"{name}.bin"
        try:
            with path.open("rb", buffering=0) as file:
                _fill(file, offset, block, path)
        except OSError as error:
            raise OutputError(f"{path}: cannot read: {error.strerror}", _REDO) from error
        return block

    def valid(self, name: str) -> bool:
        """Whether the tensor file is there and its bytes are the ones written."""
        if name in self._trusted:
            return True
        expected = self.get(f"{name}.sum")
        path = self.folder / f"{name}.bin"
        if expected is None or not path.is_file():
            return False
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                return False
        self._trusted.add(name)
        return True

    @contextlib.contextmanager
    def scratch(self, name: str, rows: int, width: int) -> Iterator[torch.Tensor]:
        """A mapped (rows, width) tensor that is gone when the block ends."""
        path = self.folder / f"{name}.tmp"
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
        self._trusted.discard(name)
        for ending in (".bin", ".sum.json"):
            (self.folder / f"{name}{ending}").unlink(missing_ok=True)

    def put(self, name: str, record: Any) -> None:
        """Write a JSON record."""
        body = json.dumps(record, sort_keys=True)
        digest = hashlib.sha256(body.encode()).hexdigest()
        with durable(self.folder / f"{name}.json") as file:
            file.write(f'{{"sha256": "{digest}", "record": {body}}}\n'.encode())

    def forget(self, name: str) -> None:
        """Remove a JSON record."""
        (self.folder / f"{name}.json").unlink(missing_ok=True)

    def put_bytes(self, name: str, data: bytes) -> None:
        """Write raw bytes to ``name.bits``."""
        with durable(self.folder / f"{name}.bits") as file:
            file.write(data)

    def get(self, name: str) -> Any | None:
        """A JSON record; ``None`` if it is missing or damaged."""
        try:
            loaded = json.loads((self.folder / f"{name}.json").read_bytes())
            body = json.dumps(loaded["record"], sort_keys=True)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if hashlib.sha256(body.encode()).hexdigest() != loaded.get("sha256"):
            return None
        return loaded["record"]


class Scratch:
    """One tensor a seed in a file that is gone when the layer is done."""

    def __init__(self, path: Path, lengths: Sequence[int], like: torch.Tensor) -> None:
        self._path, self._lengths = path, lengths
        self._width, self._dtype = like.shape[1], like.dtype
        with disk_errors(path):
            self._file = path.open("w+b", buffering=0)

    def write(self, seed: int, block: torch.Tensor) -> None:
        """Store the (n, width) block of ``seed``; writing it again replaces it."""
        data = block.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data
        with disk_errors(self._path):
            self._file.seek(self._offset(seed))
            done = 0
            while done < len(data):
                done += self._file.write(data[done:]) or 0

    def read(self, seed: int) -> torch.Tensor:
        """The block of ``seed``."""
        block = torch.empty(self._lengths[seed], self._width, dtype=self._dtype)
        _fill(self._file, self._offset(seed), block, self._path)
        return block

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def _offset(self, seed: int) -> int:
        return sum(self._lengths[:seed]) * self._width * self._dtype.itemsize


def _fill(file: Any, offset: int, block: torch.Tensor, path: Path) -> None:
    data = block.view(torch.uint8).numpy().reshape(-1).data
    file.seek(offset)
    filled = 0
    while filled < len(data):
        count = file.readinto(data[filled:])
        if not count:
            raise OutputError(f"{path}: shorter than this run wrote it", _REDO)
        filled += count


_REDO = "run the same command again: damaged work is noticed and done anew"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
