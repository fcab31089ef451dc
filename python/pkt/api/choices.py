"""Options that several commands have, checked and resolved in one way."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pkt.config import parse_bytes
from pkt.errors import IncompatibleError, UsageError
from pkt.host import memory_limit
from pkt.models import Model


def require_choice(option: str, value: str, kind: Any) -> None:
    """Raise `UsageError` unless ``value`` is one of the literals of ``kind``."""
    if value not in get_args(kind):
        raise UsageError(f"--{option} {value}: expected one of {', '.join(get_args(kind))}")


def checked_every(every: int | None) -> int | None:
    """``spool_every`` as given; raises `UsageError` unless it is 1 or more."""
    if every is not None and every < 1:
        raise UsageError(f"--spool-every {every}: expected auto, or 1 or more")
    return every


def optional_path(given: str | Path | None) -> Path | None:
    """The path given, if one was."""
    return None if given is None else Path(given)


def budget(max_ram: str | None, sharing: int = 1) -> tuple[int, str]:
    """The memory budget of one of the processes ``sharing`` this host, and where it comes from."""
    if max_ram and max_ram != "auto":
        return parse_bytes(max_ram), f"--max-ram {max_ram}"
    limit, source = memory_limit()
    shared = f", shared by {sharing} processes" if sharing > 1 else ""
    return int(limit * 0.9) // sharing, f"nine tenths of {source}{shared}"


def compute_dtype(model: Model, wanted: str) -> str:
    """F32 or BF16: what ``--dtype`` says, or the checkpoint's own type under ``auto``.

    float16 is computed in float32: its gradients underflow, and bfloat16 would round its weights.
    """
    names = {"float32": "F32", "bfloat16": "BF16"}
    if wanted in names:
        return names[wanted]
    if wanted != "auto":
        raise UsageError(f"--dtype {wanted}: expected auto, float32 or bfloat16")
    found = model.checkpoint.dtypes()
    if not found:
        raise IncompatibleError(f"{model.folder}: its layers hold no floating-point weights")
    return "BF16" if found[0] in ("BF16", "F8_E4M3", "F8_E5M2") else "F32"


def base_name(model: Model) -> str:
    """The model as an adapter and its card name it: hub id, or folder as given."""
    return model.source if not Path(model.source).is_dir() else str(Path(model.source))
