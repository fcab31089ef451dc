"""Rows of local data files (JSONL, JSON, CSV, Parquet; gzip), each with the place it stands at."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pkt.errors import DataError, UsageError

Row = dict[str, Any]
_KINDS: Mapping[type, str] = {str: "a string", list: "a list", int: "an integer", dict: "an object"}


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Place ("file:line") and columns of each row.

    ``.jsonl`` holds an object a line, ``.json`` a list of objects, ``.parquet`` a table; the
    first two also with ``.gz``.

    Raises:
        DataError: unreadable, not of its format, or a row that is no object.
        UsageError: Parquet without pyarrow.

    """
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    text = read_text(path)
    if path.name.removesuffix(".gz").endswith(".json"):
        rows = _json(text, str(path))
        if not isinstance(rows, list):
            raise DataError(f"{path}: expected a list of objects, found {kind(rows)}")
        places = [(f"{path}: entry {number}", row) for number, row in enumerate(rows, 1)]
    else:
        places = [
            (f"{path}:{number}", _json(line, f"{path}:{number}"))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    for where, row in places:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {kind(row)}")
        yield where, row


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Place and columns of each row of a CSV file without header."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if len(cells) != len(columns):
                raise DataError(
                    f"{where}: expected {len(columns)} columns ({', '.join(columns)}), "
                    f"found {len(cells)}"
                )
            yield where, dict(zip(columns, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from error


def read_text(path: Path) -> str:
    """A file's text, unpacked where its name ends in ``.gz``."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_object(path: Path) -> Row:
    """A JSON file that holds one object."""
    loaded = _json(read_text(path), str(path))
    if not isinstance(loaded, dict):
        raise DataError(f"{path}: expected a JSON object, found {kind(loaded)}")
    return loaded


def need(row: Row, where: str, **columns: type) -> None:
    """Check that ``row`` has these columns, of these types.

    Raises:
        DataError: one is missing or of another type; names the place and what is there.

    """
    for name, wanted in columns.items():
        if name not in row:
            found = ", ".join(f"'{key}'" for key in row) or "none"
            raise DataError(f"{where}: missing column '{name}'; found {found}")
        if not isinstance(row[name], wanted) or isinstance(row[name], bool):
            expected = _KINDS[wanted]
            raise DataError(f"{where}: '{name}': expected {expected}, found {kind(row[name])}")


def kind(value: Any) -> str:
    """A JSON value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", float: "a number", **_KINDS}
    return names.get(type(value), type(value).__name__)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise DataError(
            f"{where}: not valid JSON at {at}column {error.colno}: {error.msg}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: JSON that Python does not read: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: reading Parquet needs pyarrow", "pip install 'pkt-llm[eval]'"
        ) from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: not a Parquet file: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row
