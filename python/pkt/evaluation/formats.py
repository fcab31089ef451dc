"""Public benchmark files as they are distributed → documents under lm-eval's column names.

The layouts, and where each is from, are written down in ``pkt/data/tasks/README.md``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkt.errors import DataError
from pkt.evaluation.files import Row, need, read_csv, read_object, read_rows, read_text

LETTERS = "ABCD"
#: Of mbpp.jsonl, the ids that the authors call the test part.
MBPP_TEST = range(11, 511)


@dataclass(frozen=True, slots=True)
class Part:
    """The documents of one benchmark, or of one subject of it."""

    name: str  #: "anatomy"; "" where a benchmark has no parts
    test: tuple[Row, ...]
    shots: tuple[Row, ...] = ()  #: solved ones, for few-shot prompts


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a benchmark's files are looked for, and what reads them."""

    names: tuple[str, ...]  #: patterns below --data, the first that is found is taken
    content: str  #: what such a file holds, for messages
    read: Callable[[Sequence[Path]], list[Part]]


def read_benchmark(task: str, data: Path) -> list[Part]:
    """The documents of ``task`` below ``data``, a folder or one of the task's own files.

    A folder named like the task inside ``data`` is preferred to ``data`` itself.

    Raises:
        DataError: no such file (says what is expected under which names), or one that is not of
            its format (file and line).

    """
    layout = LAYOUTS[task]
    parts = layout.read(find(task, data))
    if not any(part.test for part in parts):
        raise DataError(f"{data}: task '{task}': no document to evaluate on")
    return parts


def find(task: str, data: Path) -> list[Path]:
    """The files of ``task``, sorted."""
    layout = LAYOUTS.get(task, _LOSS)
    if data.is_file():
        return [data]
    for folder in (data / task, data):
        for pattern in layout.names:
            if found := sorted(path for path in folder.glob(pattern) if path.is_file()):
                return found
    state = "holds none of them" if data.is_dir() else "does not exist"
    raise DataError(
        f"task '{task}': expected {layout.content}, as {' or '.join(layout.names)} in --data; "
        f"{data} {state}",
        f"give --data {task}=FILE, or the folder that holds it",
    )


def digest(parts: Sequence[Part]) -> str:
    """SHA-256 of documents, whatever file format they came in."""
    text = json.dumps([[p.name, p.test, p.shots] for p in parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _gsm8k(paths: Sequence[Path]) -> list[Part]:
    test = [_question(where, row) for path in paths for where, row in read_rows(path)]
    beside = [p for path in paths for p in _siblings(path, "test", "train")]
    shots = [_question(where, row) for path in beside for where, row in read_rows(path)]
    return [Part("", tuple(test), tuple(shots))]


def _question(where: str, row: Row) -> Row:
    need(row, where, question=str, answer=str)
    return {"question": row["question"], "answer": row["answer"]}


def _mmlu(paths: Sequence[Path]) -> list[Part]:
    test, shots = _subjects(paths), dict[str, list[Row]]()
    for path in paths:
        for dev in (*_siblings(path, "test", "dev"), *_siblings(path, "test", "dev", up=True)):
            for subject, rows in _subjects([dev]).items():
                shots.setdefault(subject, rows)
    return [Part(name, tuple(rows), tuple(shots.get(name, ()))) for name, rows in test.items()]


def _subjects(paths: Sequence[Path]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for path in paths:
        name = re.sub(r"_(test|dev|val)$", "", path.name.split(".")[0])
        if re.match(r"(test|dev)-", name):
            name = path.parent.name
        for where, row in _questions(path):
            subject = str(row.get("subject") or name)
            document = {key: row[key] for key in ("question", "choices", "answer")}
            found.setdefault(subject, []).append({**document, "subject": subject})
            if len(row["choices"]) != 4 or row["answer"] not in range(4):
                raise DataError(f"{where}: expected 4 choices and an answer from 0 to 3")
    return dict(sorted(found.items()))


def _questions(path: Path) -> Iterator[tuple[str, Row]]:
    if path.name.removesuffix(".gz").endswith(".csv"):
        for where, row in read_csv(path, ("question", *LETTERS, "answer")):
            letter = row["answer"].strip()
            if letter not in tuple(LETTERS):
                raise DataError(f"{where}: answer: expected A, B, C or D, found {letter!r}")
            choices = [row[name] for name in LETTERS]
            question = {"question": row["question"], "choices": choices}
            yield where, {**question, "answer": LETTERS.index(letter)}
        return
    for where, row in read_rows(path):
        need(row, where, question=str, choices=list, answer=int)
        yield where, row


def _superni(paths: Sequence[Path]) -> list[Part]:
    folder = paths[0].parent
    for listed in (folder / "test_tasks.txt", folder.parent / "splits/default/test_tasks.txt"):
        if listed.is_file() and len(paths) > 1:
            wanted = set(read_text(listed).split())
            paths = [path for path in paths if path.name.split(".")[0] in wanted] or paths
            break
    parts = []
    for path in paths:
        task = read_object(path)
        need(task, str(path), Definition=list, Instances=list)
        if not task["Definition"]:
            raise DataError(f"{path}: 'Definition' is empty")
        definition = "\n".join(map(str, task["Definition"]))
        shots = [
            {
                **_instance(row, f"{path}: Positive Examples[{i}]"),
                "definition": definition,
                "number": i + 1,
            }
            for i, row in enumerate(task.get("Positive Examples", []))
        ]
        test = [
            {**_instance(row, f"{path}: Instances[{i}]"), "definition": definition}
            for i, row in enumerate(task["Instances"])
        ]
        parts.append(Part(path.name.split(".")[0], tuple(test), tuple(shots)))
    return parts


def _instance(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with 'input' and 'output'")
    references = [row["output"]] if isinstance(row.get("output"), str) else row.get("output")
    need({**row, "output": references}, where, input=str, output=list)
    if not references or not all(isinstance(text, str) for text in references):
        raise DataError(f"{where}: 'output': expected a string or a list of strings")
    return {"input": row["input"], "output": references}


def _alpacafarm(paths: Sequence[Path]) -> list[Part]:
    rows = []
    for path in paths:
        for where, row in read_rows(path):
            need(row, where, instruction=str)
            given = row.get("input") or ""
            need({"input": given}, where, input=str)
            rows.append({"instruction": row["instruction"], "input": given})
    return [Part("", tuple(rows))]


def _humaneval(paths: Sequence[Path]) -> list[Part]:
    columns = ("task_id", "prompt", "entry_point", "test")
    rows = []
    for path in paths:
        for where, row in read_rows(path):
            need(row, where, **dict.fromkeys(columns, str))
            rows.append({name: row[name] for name in columns})
    return [Part("", tuple(rows))]


def _mbpp(paths: Sequence[Path]) -> list[Part]:
    rows = []
    for path in paths:
        for where, row in read_rows(path):
            need(row, where, task_id=int, test_list=list)
            text = "text" if "text" in row else "prompt"  # the sanitized file's name for it
            need(row, where, **{text: str})
            if len(row["test_list"]) < 3:
                raise DataError(f"{where}: 'test_list': expected 3 tests or more")
            imports = row.get("test_imports") or []
            setup = [row["test_setup_code"]] if row.get("test_setup_code") else []
            rows.append(
                {
                    "task_id": row["task_id"],
                    "text": row[text],
                    "test_list": row["test_list"],
                    "setup": "\n".join([*imports, *setup]),
                }
            )
    part = [row for row in rows if row["task_id"] in MBPP_TEST]
    return [Part("", tuple(part or rows))]


def _siblings(path: Path, own: str, wanted: str, up: bool = False) -> list[Path]:
    """Files like ``path`` of another part: test.jsonl → train.jsonl, test/x_test.csv → dev/…"""
    folder = path.parent
    if up:
        if folder.name != own:
            return []
        folder = folder.with_name(wanted)
    stem = re.sub(rf"(?<![a-zA-Z]){own}(?![a-zA-Z])", wanted, path.name)
    if path.suffix == ".parquet":  # the number of shards differs from part to part
        stem = re.sub(r"-\d{5}-of-\d{5}", "-*", stem)
    return sorted(p for p in folder.glob(stem) if p != path and p.is_file())


LAYOUTS: Mapping[str, Layout] = {
    "gsm8k": Layout(
        ("test.jsonl", "main/test-*.parquet", "test-*.parquet", "gsm8k*.jsonl"),
        'lines of {"question", "answer"}',
        _gsm8k,
    ),
    "mmlu": Layout(
        (
            "test/*_test.csv",
            "data/test/*_test.csv",
            "*_test.csv",
            "all/test-*.parquet",
            "*/test-*.parquet",
            "test-*.parquet",
        ),
        "a CSV a subject (question, A, B, C, D, answer; no header) or the hub's Parquet",
        _mmlu,
    ),
    "superni": Layout(
        ("tasks/task*.json", "task*.json"),
        "Super-NaturalInstructions tasks (Definition, Positive Examples, Instances)",
        _superni,
    ),
    "alpacafarm": Layout(
        ("alpaca_farm_evaluation.json", "alpaca_farm*.json*", "alpaca_eval*.json*"),
        'a list of {"instruction", "input"}',
        _alpacafarm,
    ),
    "humaneval": Layout(
        ("HumanEval.jsonl.gz", "HumanEval.jsonl", "human-eval*.jsonl*"),
        'lines of {"task_id", "prompt", "entry_point", "test"}',
        _humaneval,
    ),
    "mbpp": Layout(
        ("mbpp.jsonl", "sanitized-mbpp.json", "mbpp*.jsonl"),
        'lines of {"task_id", "text", "test_list"}, or the sanitized list with "prompt"',
        _mbpp,
    ),
}
LAYOUTS = {**LAYOUTS, "gsm8k_cot": LAYOUTS["gsm8k"]}
_LOSS = Layout(
    ("loss.jsonl", "test.jsonl"),
    'lines of {"text"}, {"question", "answer"}, {"prompt", "completion"} or {"messages"}',
    lambda paths: [],
)
