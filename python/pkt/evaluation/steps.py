"""Finished parts of an evaluation: one file a model and task, so that a kill costs one of them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pkt.evaluation.harness import Score


class Steps:
    """What is finished below a work folder; each step's rows lie in ``details`` before it counts.

    Args:
        work: a run's work folder.

    """

    def __init__(self, work: Path) -> None:
        self.staged = work / "staged"
        self._steps = work / "steps"
        for folder in (self._steps, self.staged / "details"):
            folder.mkdir(parents=True, exist_ok=True)

    def has(self, column: str, task: str) -> bool:
        """Whether this step is finished."""
        return self._path(column, task).is_file()

    def read(self, column: str, task: str) -> dict[str, Any]:
        """What `write` was given."""
        found: dict[str, Any] = json.loads(self._path(column, task).read_text(encoding="utf-8"))
        return found

    def write(
        self, column: str, task: str, scores: Iterable[Score], rows: Iterable[Mapping[str, Any]],
        **more: Any,
    ) -> None:  # fmt: skip
        """Keep scores and what else belongs to them; ``rows`` become details/TASK/COLUMN.jsonl."""
        details = self.staged / "details" / file_name(task) / f"{file_name(column)}.jsonl"
        details.parent.mkdir(exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        _durably(details, "".join(lines))
        kept = {"scores": [_score(score) for score in scores], **more}
        _durably(self._path(column, task), json.dumps(kept))

    def _path(self, column: str, task: str) -> Path:
        return self._steps / f"{file_name(task)}--{file_name(column)}.json"


def file_name(text: str) -> str:
    """``text`` as one path component."""
    return re.sub(r"[^\w.@+-]", "_", text).lstrip(".") or "_"


def _score(score: Score) -> dict[str, Any]:
    return {
        "metric": score.metric,
        "value": number(score.value),
        "stderr": number(score.error),
        "count": score.count,
        "higher_is_better": score.higher_is_better,
    }


def number(value: float) -> float | None:
    """``None`` for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _durably(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
