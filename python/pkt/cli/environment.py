"""What the environment says, read here and nowhere else, and what libraries are told by it.

PKT_ALIASES names the user's table of aliases, PKT_DEBUG=1 asks for tracebacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pkt.config import load_aliases
from pkt.errors import UsageError

_LIBRARIES = {
    "TOKENIZERS_PARALLELISM": "false",  # else it warns after a fork
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # "Loading weights" among others
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "THP_MEM_ALLOC_ENABLE": "1",  # large tensors in huge pages: a tenth of a sweep is page faults
}


def set_up() -> None:
    """Tell the libraries (unless the user has), and make streams that never fail to encode."""
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # torchrun sets it; the Rust core follows
        os.environ.setdefault("RAYON_NUM_THREADS", threads)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def debugging() -> bool:
    """Whether PKT_DEBUG asks for tracebacks and the libraries' warnings."""
    return os.environ.get("PKT_DEBUG", "0") not in ("", "0")


def processes() -> tuple[int, int]:
    """This process's number and how many there are, as `accelerate launch` or torchrun says."""
    return _number("RANK", 0), _number("WORLD_SIZE", 1)


def processes_here() -> int:
    """How many of them run on this host and share its memory."""
    return _number("LOCAL_WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """What a launcher says; what no launcher says (an empty variable) counts as unsaid."""
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


def launcher() -> list[str] | None:
    """The words that start `pkt` as it was started; ``None`` on several hosts."""
    if processes()[1] == 1:
        return ["pkt"]
    if processes_here() < processes()[1]:
        return None
    return ["torchrun", "--standalone", "--nproc-per-node", str(processes_here()), "-m", "pkt"]


def stay_offline() -> None:
    """No download: a hub id is looked up in the local cache alone (before the hub is imported)."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def alias_file() -> Path:
    """The user's table of aliases, which need not exist."""
    if named := os.environ.get("PKT_ALIASES"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "pkt" / "aliases.yaml"


def aliases() -> Mapping[str, str]:
    """Built-in aliases and the user's.

    Raises:
        UsageError: PKT_ALIASES names no file, or the table is not one.

    """
    path = alias_file()
    if os.environ.get("PKT_ALIASES") and not path.is_file():
        raise UsageError(f"PKT_ALIASES: {path}: no such file")
    return load_aliases(path)
