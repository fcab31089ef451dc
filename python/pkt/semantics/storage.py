"""A map as a safetensors file that knows what it was made from.

The metadata holds the hashes of the inputs, what was found on the way, and a hash of all that and
the matrix: a file of other inputs, or a damaged one, is none. It is one entry, because safetensors
writes several in no fixed order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pkt.errors import OutputError

_NAME, _RECORD = "map", "pkt_map"


def save_map(
    path: Path, made: torch.Tensor, inputs: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """Write M (D_S, D_T) as float32, whole or not at all.

    Args:
        path: of the file; its folder is made if missing.
        made: M.
        inputs: JSON; what M depends on.
        found: JSON; what is to be known of M without making it again.

    Raises:
        OutputError: it cannot be written.

    """
    from safetensors.torch import save

    stored = made.float().cpu().contiguous()
    record = {"inputs": dict(inputs), "found": dict(found)}
    text = json.dumps({**record, "sha256": _digest(stored, record)})  # found keeps its order
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(save({_NAME: stored}, metadata={_RECORD: text}))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: the map cannot be written: {error.strerror}") from error


def load_map(path: Path, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """M (D_S, D_T) float32 and what was found; ``None`` unless it is sound and of ``inputs``."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()[_RECORD])
            stored = file.get_tensor(_NAME)
        digest = record.pop("sha256")
        same = record["inputs"] == json.loads(json.dumps(inputs))
        sound = digest == _digest(stored, record)
        found = dict(record["found"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return (stored, found) if same and sound else None


def _digest(stored: torch.Tensor, record: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    digest.update(stored.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
