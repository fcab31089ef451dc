"""Settings: sizes, YAML files, and the table of model aliases.

Nothing here reads the environment: the CLI hands in what it found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pkt.errors import UsageError

GIB = 1 << 30
MIB = 1 << 20
LOGIT_ELEMENTS = 1 << 23  # logits made at once; a constant, so that no result depends on a budget
# Of a bfloat16 product that is made in float32, widened at once: elements of the weight, and rows.
WIDENED_ELEMENTS, WIDENED_ROWS = 1 << 23, 512
#: Windows with a shorter side up to this, or to so many times the rank, are decomposed whole.
WHOLE_BELOW, WHOLE_RANKS = 384, 4
SMALL_LAYER = 1 << 20  # parameters; products this small lose more to threads than they gain
READ_THREADS = 8  # that read files; twice as many gained nothing where it was measured

MOST_BYTES = 1 << 60  # of a size that somebody can mean

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500MB``, ``6g`` or ``1073741824``.

    Raises:
        UsageError: not a number with an optional unit.

    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if not match:
        raise UsageError(f"size {text!r}: expected a number with a unit", "for example 8GiB")
    size = float(match[1]) * _UNITS[match[2]]
    if size > MOST_BYTES:
        raise UsageError(f"size {text[:40]!r}: expected at most 2⁶⁰ bytes", "for example 8GiB")
    return int(size)


def format_bytes(count: float) -> str:
    """A size for people: ``1.61 GiB``, ``24.0 MiB``, ``812 B``."""
    for unit, size in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", 1 << 10)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
    return f"{int(count)} B"


def load_yaml(path: Path, known: frozenset[str]) -> dict[str, Any]:
    """The options of a YAML file, spelled as on the command line without the dashes.

    Args:
        path: file that holds one mapping of option to value.
        known: option names that the command takes, with underscores.

    Raises:
        UsageError: unreadable, not a mapping, or an option the command does not have.

    """
    loaded = _read_yaml(path)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: expected a mapping of options, found {type(loaded).__name__}")
    options = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    unknown = sorted(set(options) - known)
    if unknown:
        names = ", ".join(sorted(name.replace("_", "-") for name in known))
        raise UsageError(f"{path}: unknown option '{unknown[0]}'", f"known: {names}")
    return options


def load_aliases(user_file: Path | None) -> Mapping[str, str]:
    """The alias table: built-in entries, overridden by those of ``user_file`` if it exists.

    Raises:
        UsageError: the user's table is unreadable, or no mapping of names to folders or hub ids.

    """
    built_in = resources.files("pkt").joinpath("data/aliases.yaml").read_text(encoding="utf-8")
    table: dict[str, str] = dict(yaml.safe_load(built_in))
    if user_file is not None and user_file.is_file():
        loaded = _read_yaml(user_file) or {}
        if not isinstance(loaded, dict) or not all(isinstance(v, str) for v in loaded.values()):
            raise UsageError(
                f"{user_file}: expected lines of 'alias: folder or hub id'",
                "for example '70b: /models/Llama-2-70b-hf'",
            )
        table |= {str(key): value for key, value in loaded.items()}
    return table


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise UsageError(f"{path}: not valid YAML: {where}") from error
