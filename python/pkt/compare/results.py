"""What the cells of a comparison say: one row an arm, against the best that saw no teacher."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pkt.compare.arms import Arm
from pkt.compare.cells import Cell
from pkt.compare.search import chosen_rate
from pkt.compare.statistics import paired_difference, spread
from pkt.records import SampleSet


@dataclass(frozen=True)
class ArmResult:
    """An arm at its best rate."""

    arm: Arm
    losses: Mapping[float, float]  #: validation loss by rate, of repeat 0
    cells: Sequence[Cell]  #: at the chosen rate, one a repeat

    @property
    def rate(self) -> float:
        """The chosen learning rate."""
        return chosen_rate(dict(self.losses))

    @property
    def nll(self) -> Any:
        """Σ nll of each test example, float64 (repeats, examples)."""
        return np.array([cell.test for cell in self.cells])


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: where it is, and `results.json`."""

    folder: Path
    found: Mapping[str, Any]

    @staticmethod
    def read(folder: Path) -> Comparison:
        """A comparison that was finished earlier."""
        return Comparison(folder, json.loads((folder / "results.json").read_text("utf-8")))


def results(
    arms: Sequence[ArmResult], lines: Mapping[str, Any], validation: SampleSet, test: SampleSet
) -> dict[str, Any]:
    """`results.json`.

    Args:
        arms: in the order of the table.
        lines: Σ nll by example of ``student`` and ``teacher`` (``None``: not measured).
        validation: what the rates were chosen on.
        test: what everything is measured on.

    """
    tokens = np.array([sample.loss_tokens for sample in test.samples], dtype=np.float64)

    def mean(nll: Any) -> float | None:
        return None if nll is None else float(np.sum(nll) / tokens.sum())

    student, teacher = mean(lines["student"]), mean(lines["teacher"])
    unaware = [arm for arm in arms if not arm.arm.knows_teacher and _finite(arm)]
    best = min(unaware, key=_validation, default=None)
    rows = []
    for arm in arms:
        row: dict[str, Any] = {
            "arm": arm.arm.name,
            "about": arm.arm.about,
            "knows_teacher": arm.arm.knows_teacher,
            "rate": arm.rate,
            "validation_by_rate": [
                [rate, loss if math.isfinite(loss) else None]
                for rate, loss in sorted(arm.losses.items())
            ],
            "trainable": max(cell.trainable for cell in arm.cells),
            "repeats": len(arm.cells),
            "test": None,
        }
        if _finite(arm):
            each = [float(nll.sum() / tokens.sum()) for nll in arm.nll]
            row |= {"test": float(np.mean(each)), "test_by_repeat": each, "spread": spread(each)}
            row["spread"] = None if math.isnan(row["spread"]) else row["spread"]
            if student is not None and teacher is not None and student != teacher:
                row["gap_closed"] = (student - row["test"]) / (student - teacher)
            if best is not None and arm is not best:
                against = paired_difference(arm.nll, best.nll, tokens)
                row |= {
                    "difference": against.mean,
                    "interval": [against.low, against.high],
                    "p": against.p,
                }
        rows.append(row)
    return {
        "student": student,
        "teacher": teacher,
        "teacher_note": lines.get("teacher_note"),
        "reference": best.arm.name if best else None,
        "validation_examples": len(validation.samples),
        "test_examples": len(test.samples),
        "test_tokens": int(tokens.sum()),
        "arms": rows,
    }


def table(found: Mapping[str, Any]) -> str:
    """`results.md`: the rows of `results.json` as a Markdown table."""
    reference = found["reference"]
    head = ["arm", "rate", "test loss", "±", "gap closed", f"against {reference}", "95 %", "p"]
    rows = [head, ["---", "--:", "--:", "--:", "--:", "--:", "--:", "--:"]]
    rows.append(["student", "", _number(found["student"]), "", "0 %", "", "", ""])
    for row in found["arms"]:
        cells = [row["arm"], f"{row['rate']:g}"]
        if row["test"] is None:
            rows.append([*cells, "diverged", "", "", "", "", ""])
            continue
        gap = f"{100 * row['gap_closed']:.1f} %" if "gap_closed" in row else ""
        cells += [_number(row["test"]), _number(row["spread"]), gap]
        if "difference" in row:
            low, high = row["interval"]
            cells += [f"{row['difference']:+.4f}", f"{low:+.4f} … {high:+.4f}", f"{row['p']:.2g}"]
        else:
            cells += ["", "", ""]
        rows.append(cells)
    if found["teacher"] is not None:
        rows.append(["teacher", "", _number(found["teacher"]), "", "100 %", "", "", ""])
    if reference is None:
        rows = [row[:5] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _finite(arm: ArmResult) -> bool:
    return all(math.isfinite(cell.validation) for cell in arm.cells)


def _validation(arm: ArmResult) -> float:
    """What the reference is chosen by: never the test."""
    return float(np.mean([cell.validation for cell in arm.cells]))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
