"""Scores of several models side by side, and the share of the gap that each adapter closes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pkt.evaluation.columns import STUDENT, TEACHER

Step = Mapping[str, Any]


def compare(
    steps: Mapping[str, Mapping[str, Step]], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """One row a task and metric.

    ``gap_closed = (student − adapter) / (student − teacher)``, for losses and scores alike: 0 is
    the student, 1 the teacher. It is ``resolved`` where student and teacher differ by more than
    twice the standard error of their difference (taken as independent); else it is mostly noise.

    Args:
        steps: by task, by column, what `Steps.read` returns.
        columns: in the table's order.

    """
    rows: list[dict[str, Any]] = []
    for task, found in steps.items():
        metrics: dict[str, bool] = {}
        for step in found.values():
            metrics |= {s["metric"]: s["higher_is_better"] for s in step["scores"]}
        for metric, higher in metrics.items():
            values = {
                column: {key: score[key] for key in ("value", "stderr", "count")}
                for column in columns
                for score in (found[column]["scores"] if column in found else ())
                if score["metric"] == metric
            }
            row = {"task": task, "metric": metric, "higher_is_better": higher, "values": values}
            rows.append({**row, **_gap(values)})
    return rows


def _gap(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if STUDENT not in values or TEACHER not in values:
        return {}
    student, teacher = values[STUDENT], values[TEACHER]
    gap = student["value"] - teacher["value"]
    closed = {
        column: (student["value"] - value["value"]) / gap
        for column, value in values.items()
        if column not in (STUDENT, TEACHER) and gap
    }
    errors = [student["stderr"] or 0.0, teacher["stderr"] or 0.0]
    known = student["stderr"] is not None and teacher["stderr"] is not None
    resolved = known and abs(gap) > 2 * sum(e * e for e in errors) ** 0.5
    return {"gap_closed": closed, "gap_resolved": resolved}


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The table as Markdown whose columns also line up as plain text."""
    head = ["task", "metric", *columns]
    body = [
        [row["task"], row["metric"], *(_cell(row, column) for column in columns)] for row in rows
    ]
    widths = [max(3, *(len(line[i]) for line in (head, *body))) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i < 2 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    notes = ["± is one standard error."]
    if any(row.get("gap_closed") for row in rows):
        notes.append(
            "In brackets: share of the gap from student to teacher that is closed; "
            "'?' where that gap is within its noise."
        )
    return "\n".join([line(head), line(rule), *map(line, body), "", *notes])


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row["values"].get(column)
    if value is None or value["value"] is None:
        return "–"
    text = _number(value["value"])
    if value["stderr"]:
        text += f" ± {_number(value['stderr'])}"
    closed = row.get("gap_closed", {}).get(column)
    if closed is not None:
        text += f" ({closed:.0%}{'' if row['gap_resolved'] else '?'})"
    return text


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
