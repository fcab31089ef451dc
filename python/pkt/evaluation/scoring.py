"""Scores that need no model: exact match and ROUGE-L, and programs with their tests."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from pkt.evaluation.files import Row
from pkt.evaluation.harness import Score, mean_score

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_generation(document: Row, results: Sequence[str]) -> dict[str, float]:
    """What lm-eval notes of one generation.

    Documents with a list of references under ``output`` (Super-NaturalInstructions) get
    ``exact_match`` and ``rougeL``, the best over the references; all others ``answered``, 1 for
    a generation that is not blank.
    """
    text = results[0]
    if not isinstance(document.get("output"), list):
        return {"answered": float(bool(text.strip()))}
    references = document["output"]
    return {
        "exact_match": max(exact_match(text, reference) for reference in references),
        "rougeL": max(rouge_l(text, reference) for reference in references),
    }


def exact_match(prediction: str, reference: str) -> float:
    """1 where both are equal in lower case, without punctuation, white space made single."""
    return float(_plain(prediction) == _plain(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of stemmed words, from 0 to 1 (rouge-score)."""
    return float(_scorer().score(target=reference, prediction=prediction)["rougeL"].fmeasure)


def program(task: str, document: Mapping[str, Any], generation: str) -> str:
    """The program whose clean end means that ``generation`` solves the problem.

    As lm-eval joins them: HumanEval's prompt, completion, test and a call of ``check``; MBPP's
    completion and its first three assertions, after the imports its tests ask for.
    """
    if task == "humaneval":
        tests = f"{document['test']}\ncheck({document['entry_point']})"
        return f"{document['prompt']}{generation}\n{tests}\n"
    lines = [document["setup"]] if document.get("setup") else []
    return "\n".join([*lines, generation, *document["test_list"][:3]]) + "\n"


def score_programs(task: str, rows: Sequence[Row]) -> tuple[list[Score], list[Row]]:
    """pass@1 of `harness.run_tasks`' rows, each program run once in `pkt.sandbox`.

    Returns:
        the score, and the rows with ``passed`` and, where it failed, the ``reason``.

    Raises:
        PktError: this host offers no isolation.

    """
    from pkt.sandbox import run_all

    outcomes = run_all([program(task, row["doc"], row["answer"]) for row in rows])
    scored = [
        {**row, "passed": outcome.passed, "reason": outcome.reason}
        for row, outcome in zip(rows, outcomes, strict=True)
    ]
    return [mean_score("pass@1", [float(outcome.passed) for outcome in outcomes])], scored


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
