"""Where benches leave their results: a line with date and machine, then the numbers."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from pkt.host import describe

FOLDER = Path(__file__).resolve().parents[1] / "record"


def machine() -> str:
    host = describe()
    return f"{host['processor']}, {host['cores']} cores, {int(host['memory_bytes']) >> 30} GiB"


def write_record(name: str, lines: Sequence[str]) -> None:
    """Append to ``benches/record/NAME.txt`` and print."""
    FOLDER.mkdir(exist_ok=True)
    text = "\n".join([f"## {datetime.date.today().isoformat()}", *lines, ""])
    with (FOLDER / f"{name}.txt").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
    print(text)
