"""Several results as one page: a table, texts, and the pictures of each result's own report."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import jinja2

from pkt.errors import OutputError


def write_overview(folder: Path, table: str, stories: Mapping[str, str]) -> Path:
    """Write ``index.html`` into ``folder`` and return its path.

    Args:
        folder: holds results, each with its ``report/``.
        table: Markdown; lines that begin with ``|`` are rows, the others notes.
        stories: a text by the name of what wrote it.

    Raises:
        OutputError: the folder cannot be written.

    """
    lines = table.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    parts: dict[str, dict[str, str]] = {}
    for path in sorted(folder.glob("*/report/*.png")):
        part = parts.setdefault(path.parts[-3], {})
        part[path.name] = base64.b64encode(path.read_bytes()).decode()
    source = resources.files("pkt").joinpath("data/overview.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    text = page.render(
        rows=[row for row in rows if set("".join(row)) - set("-: ")],
        notes=[line for line in lines if line and "|" not in line],
        stories=stories,
        parts=parts,
    )
    index = folder / "index.html"
    try:
        index.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{index}: cannot be written: {error.strerror}") from error
    return index
