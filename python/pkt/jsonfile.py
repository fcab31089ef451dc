"""JSON that a stranger wrote: read whole, but only from a regular file of a sane size.

A model folder comes from somewhere else. A pipe in the place of config.json must not be waited for,
a device not be read for ever, and whatever is in it must end as one line.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from pkt.errors import CheckpointError

MAX_BYTES = 16 << 20  # of a configuration; the largest known takes a hundredth
MAX_INDEX_BYTES = 100_000_000  # of the names of all tensors, as of a header


def read_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: not a regular file, longer than ``max_bytes``, or no JSON object.

    """
    try:
        found = json.loads(_regular(path, max_bytes))
    except FileNotFoundError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: nested too deeply") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read as JSON: {reason}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {shown(found)}")
    return found


def require_regular(path: Path) -> None:
    """Raise `CheckpointError` if ``path`` is there, and something else than a file.

    Libraries that open it themselves would wait for a pipe and never finish with a device.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(
            f"{path}: expected a regular file, found {_kind(path.stat().st_mode)}"
        )


def shown(value: object) -> str:
    """``value`` as an error message shows it after "found"."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _regular(path: Path, max_bytes: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            kind = _kind(about.st_mode)
            raise CheckpointError(f"{path}: expected a regular file, found {kind}")
        if about.st_size > max_bytes:
            raise CheckpointError(
                f"{path}: expected at most {max_bytes} bytes, found {about.st_size}"
            )
        return file.read(max_bytes)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device"
