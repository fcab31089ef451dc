"""Which checkpoint a run continues from: the newest that was written whole.

The Trainer writes a checkpoint file by file into its final folder, so a kill can leave half of one.
A checkpoint counts once it holds ``complete.json``, written last (fsync before and after), with the
SHA-256 of every other file; one that is damaged is passed over for the one before it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from pkt.durable import sync

COMPLETE = "complete.json"


def mark_complete(folder: Path) -> None:
    """Make the checkpoint durable, then say so."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != COMPLETE:
            digests[path.name] = _sha256(path)
            sync(path)
    temporary = folder / f"{COMPLETE}.tmp"
    temporary.write_text(json.dumps(digests), encoding="utf-8")
    sync(temporary)
    temporary.rename(folder / COMPLETE)
    sync(folder)
    sync(folder.parent)


def newest_complete(folder: Path) -> Path | None:
    """The newest whole checkpoint below ``folder``; newer fragments are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    for path in found:
        if _is_complete(path):
            return path
        shutil.rmtree(path)
    return None


def step_of(checkpoint: Path) -> int:
    """Steps that were done when it was written."""
    return int(checkpoint.name.split("-")[1])


def _is_complete(folder: Path) -> bool:
    try:
        digests = json.loads((folder / COMPLETE).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
