"""Public benchmark files as documents, and one clear line for those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pkt.errors import DataError, UsageError
from pkt.evaluation.formats import digest, find, read_benchmark
from pkt.evaluation.tasks import parse_tasks


def _write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_of_the_tasks_name_comes_first(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "#### 1"}
    _write(tmp_path / "test.jsonl", [row])
    inner = _write(tmp_path / "gsm8k/test.jsonl", [row, row])
    assert find("gsm8k", tmp_path) == [inner]
    assert len(read_benchmark("gsm8k", tmp_path)[0].test) == 2


def test_a_missing_file_says_what_is_expected_and_where(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        read_benchmark("humaneval", tmp_path)
    for part in ("task_id", "HumanEval.jsonl.gz or HumanEval.jsonl", "--data", str(tmp_path)):
        assert part in raised.value.message
    assert raised.value.exit_code == 5
    assert "--data humaneval=FILE" in (raised.value.hint or "")
    with pytest.raises(DataError, match="does not exist"):
        read_benchmark("mmlu", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("task", "name", "rows", "message"),
    [
        ("gsm8k", "test.jsonl", [{"question": "q", "answer": "1"}, {"question": "q"}],
         r"test\.jsonl:2: missing column 'answer'; found 'question'"),
        ("gsm8k", "test.jsonl", [{"question": 3, "answer": "1"}],
         r"test\.jsonl:1: 'question': expected a string, found an integer"),
        ("gsm8k", "test.jsonl", [["q", "a"]], r"jsonl:1: expected a JSON object, found a list"),
        ("mmlu", "x_test.csv", "q,a,b,c,d,A\nq,a,b,c,A\n", r"_test\.csv:2: expected 6 columns .*5"),
        ("mmlu", "x_test.csv", "q,a,b,c,d,E\n", r"x_test\.csv:1: answer: expected A, B, C or D"),
        ("superni", "task001_x.json", {"Definition": ["d"]}, "missing column 'Instances'"),
        ("superni", "task001_x.json", {"Definition": ["d"], "Instances": [{"input": "i"}]},
         r"Instances\[0\]: 'output': expected a list, found null"),
        ("superni", "task001_x.json", "{\n'a': 1}", "not valid JSON at line 2, column 1"),
        ("humaneval", "HumanEval.jsonl", [{"task_id": "HumanEval/0", "prompt": "p"}],
         r"HumanEval\.jsonl:1: missing column 'entry_point'"),
        ("mbpp", "mbpp.jsonl", [{"task_id": 11, "test_list": ["a"]}], "missing column 'prompt'"),
        ("mbpp", "mbpp.jsonl", [{"task_id": 11, "text": "t", "test_list": ["a"]}],
         "'test_list': expected 3 tests or more"),
        ("alpacafarm", "alpaca_farm_evaluation.json", [{"input": "x"}],
         "entry 1: missing column 'instruction'"),
        ("alpacafarm", "alpaca_farm_evaluation.json", {"a": 1}, "expected a list of objects"),
        ("mbpp", "mbpp.jsonl", [], "no document to evaluate on"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_says_where(
    tmp_path: Path, task: str, name: str, rows: Any, message: str
) -> None:
    _write(tmp_path / name, rows)
    with pytest.raises(DataError, match=message):
        read_benchmark(task, tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"HumanEval.jsonl.gz: not a whole gzip file"):
        read_benchmark("humaneval", tmp_path)
    (tmp_path / "test.jsonl").write_bytes(b'{"question": "a", "answer": "b"}\n\xff\n')
    with pytest.raises(DataError, match=r"test.jsonl:2: not UTF-8"):
        read_benchmark("gsm8k", tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_benchmark("mmlu", tmp_path)


def test_superni_keeps_to_the_listed_test_tasks(tmp_path: Path) -> None:
    task = {
        "Definition": ["Say", "it."],
        "Positive Examples": [{"input": "a", "output": "b", "explanation": "c"}],
        "Instances": [{"id": "1", "input": "x", "output": ["y", "z"]}],
    }
    for name in ("task001_a", "task002_b", "task003_c"):
        _write(tmp_path / f"tasks/{name}.json", task)
    assert len(read_benchmark("superni", tmp_path)) == 3
    _write(tmp_path / "splits/default/test_tasks.txt", "task001_a\ntask003_c\n")
    parts = read_benchmark("superni", tmp_path)
    assert [part.name for part in parts] == ["task001_a", "task003_c"]
    (document,) = parts[0].test
    assert (document["definition"], document["output"]) == ("Say\nit.", ["y", "z"])
    (shot,) = parts[0].shots
    assert (shot["input"], shot["output"], shot["number"]) == ("a", ["b"], 1)


def test_mbpps_sanitized_list_brings_its_imports(tmp_path: Path) -> None:
    row = {"prompt": "p", "test_imports": ["import math"], "test_list": ["a", "b", "c", "d"]}
    rows = [{**row, "task_id": n} for n in (2, 11, 12)]
    _write(tmp_path / "sanitized-mbpp.json", rows)
    documents = read_benchmark("mbpp", tmp_path)[0].test
    assert [document["task_id"] for document in documents] == [11, 12]
    assert (documents[0]["text"], documents[0]["setup"]) == ("p", "import math")
    _write(tmp_path / "sanitized-mbpp.json", rows[:1])  # nothing of the test part: all of them
    assert len(read_benchmark("mbpp", tmp_path)[0].test) == 1


def test_the_digest_is_of_the_documents_not_of_the_file(tmp_path: Path) -> None:
    rows = [{"instruction": "i", "input": "", "extra": 1}]
    _write(tmp_path / "a/alpaca_farm_evaluation.json", rows)
    _write(tmp_path / "b/alpaca_farm.jsonl", [{"instruction": "i", "generator": "x"}])
    _write(tmp_path / "c/alpaca_farm.jsonl", [{"instruction": "j"}])
    a, b, c = (digest(read_benchmark("alpacafarm", tmp_path / x)) for x in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["gsm8k@x"], "expected NAME or NAME@SHOTS"),
        (["gsm8k@8", "gsm8k@8"], "given twice"),
        (["loss@3"], "takes no shots"),
        ([], "at least one task"),
    ],
)
def test_tasks_are_names_with_shots(entries: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_tasks(entries)
    asked = parse_tasks(["loss", "gsm8k@0", "gsm8k@8"])
    assert [(each.name, each.shots) for each in asked] == [
        ("loss", None), ("gsm8k", 0), ("gsm8k", 8),
    ]  # fmt: skip
