"""Files that appear whole, synced and checked, whatever a kill or a full disk meets."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pkt.errors import OutputError


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusals into one clear line."""
    try:
        yield
    except BrokenPipeError:  # of the terminal's reader, not of the disk
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{path}: the disk is full; finished layers are kept",
                "make room, then run the same command again: it continues where it stopped",
            ) from error
        raise OutputError(f"{path}: cannot write: {error.strerror}") from error


@contextlib.contextmanager
def durable(path: Path, *, synced: bool = True) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is complete, and ``synced`` on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                if synced:
                    os.fsync(file.fileno())
            temporary.rename(path)
            if synced:
                sync(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_record(path: Path, record: Any, *, synced: bool = True) -> None:
    """A JSON value with its SHA-256, `durable`."""
    body = json.dumps(record, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    with durable(path, synced=synced) as file:
        file.write(f'{{"sha256": "{digest}", "record": {body}}}\n'.encode())


def read_record(path: Path) -> Any | None:
    """What `write_record` wrote; ``None`` if it is not there, or not as it was written."""
    try:
        loaded = json.loads(path.read_bytes())
        body = json.dumps(loaded["record"], sort_keys=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if hashlib.sha256(body.encode()).hexdigest() != loaded.get("sha256"):
        return None
    return loaded["record"]


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, are on the disk afterwards."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
