"""Exact match, ROUGE-L, programs, and the table with its share of the gap."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pkt.evaluation.harness import mean_score
from pkt.evaluation.scoring import exact_match, program, rouge_l, score_generation
from pkt.evaluation.table import compare, markdown


def test_exact_match_overlooks_case_punctuation_and_spaces() -> None:
    assert exact_match(" The  cat!\n", "the cat") == 1.0
    assert exact_match("the cats", "the cat") == 0.0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "cats" and "cat" have one stem: LCS 2 of 3 predicted and 4 expected words.
    assert rouge_l("two cats sat", "the cat had sat") == pytest.approx(2 * 2 / (3 + 4))
    assert rouge_l("", "the cat") == 0.0


def test_the_best_reference_counts() -> None:
    document = {"output": ["a red fox", "Yes."]}
    assert score_generation(document, ["yes"]) == {"exact_match": 1.0, "rougeL": 1.0}
    assert score_generation({"instruction": "x"}, [" \n"]) == {"answered": 0.0}


def test_programs_end_with_their_tests() -> None:
    document: dict[str, Any] = {
        "prompt": "def f():\n",
        "test": "def check(c): c()",
        "entry_point": "f",
    }
    built = program("humaneval", document, "    return 1")
    assert built == "def f():\n    return 1\ndef check(c): c()\ncheck(f)\n"
    document = {"test_list": ["assert a", "assert b", "assert c", "assert d"], "setup": "import m"}
    assert program("mbpp", document, "a = 1") == "import m\na = 1\nassert a\nassert b\nassert c\n"


def test_a_means_error_is_that_of_its_documents() -> None:
    score = mean_score("acc", [1.0, 0.0, 1.0, 1.0])
    assert (score.value, score.count) == (0.75, 4)
    assert score.error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))  # lm-eval's s/√N
    assert math.isnan(mean_score("acc", [1.0]).error)


def _step(value: float, higher: bool, error: float | None = 0.1) -> dict[str, Any]:
    score = {"metric": "m", "value": value, "stderr": error, "count": 9, "higher_is_better": higher}
    return {"scores": [score]}


@pytest.mark.parametrize(
    ("student", "adapter", "teacher", "higher", "closed"),
    [(4.0, 3.0, 2.0, False, 0.5), (0.2, 0.5, 0.8, True, 0.5), (4.0, 5.0, 2.0, False, -0.5)],
)
def test_the_gap_closed_is_one_for_the_teacher(
    student: float, adapter: float, teacher: float, higher: bool, closed: float
) -> None:
    columns = ["student", "lora", "teacher"]
    values = dict(zip(columns, (student, adapter, teacher), strict=True))
    steps = {"t": {name: _step(value, higher) for name, value in values.items()}}
    (row,) = compare(steps, columns)
    assert row["gap_closed"] == {"lora": pytest.approx(closed)}
    assert row["gap_resolved"]
    assert f"({closed:.0%})" in markdown([row], columns)


def test_a_gap_within_its_noise_is_marked() -> None:
    columns = ["student", "lora", "teacher"]
    steps = {
        "t": {name: _step(v, True, 0.2) for name, v in zip(columns, (0.2, 0.3, 0.4), strict=True)}
    }
    (row,) = compare(steps, columns)
    assert not row["gap_resolved"]
    assert "(50%?)" in markdown([row], columns)


def test_without_a_gap_no_share_is_made_up() -> None:
    steps = {
        "t": {"student": _step(0.0, True), "lora": _step(0.1, True), "teacher": _step(0.0, True)}
    }
    (row,) = compare(steps, ["student", "lora", "teacher"])
    assert row["gap_closed"] == {}
    (row,) = compare({"t": {"student": _step(0.0, True, None)}}, ["student"])
    assert "gap_closed" not in row


def test_the_tables_columns_line_up() -> None:
    steps = {"t": {"student": _step(1.0, True), "a-long-name": _step(20000.0, True, None)}}
    columns = ["student", "a-long-name"]
    lines = markdown(compare(steps, columns), columns).splitlines()[:3]
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split("|")[3:5] == [" 1.0000 ± 0.1000 ", "       2e+04 "]
