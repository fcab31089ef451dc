"""A comparison as two pictures and one page: loss against rate, and each arm's final loss."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from pkt.errors import OutputError
from pkt.report.pictures import ACCENT, INK, PALE, QUIET, STYLE, WIDTH, WINDOW, as_png, title

#: Distinct on white, for the colour-blind too (Okabe and Ito, without yellow); then dashes.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#22272e")
_DASHES = ("-", "--", ":")


def write_comparison(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write ``rates.png``, ``arms.png`` and ``index.html``, and return the page's path.

    Args:
        folder: where to write; made if missing.
        found: `results.json` of a comparison.

    Raises:
        OutputError: the folder cannot be written.

    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        pictures = {"arms.png": as_png(_arms(found)), "rates.png": as_png(_rates(found["arms"]))}
    source = resources.files("pkt").joinpath("data/comparison.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    images = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    text = page.render(found=found, images=images)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (folder / name).write_bytes(picture)
        (folder / "index.html").write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written: {error.strerror}") from error
    return folder / "index.html"


def _arms(found: Mapping[str, Any]) -> Figure:
    """Test loss of each arm with its repeats, between the student's and the teacher's lines."""
    rows = [row for row in found["arms"] if row["test"] is not None]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.3 * max(3, len(rows))))
    height = figure.get_size_inches()[1]
    axes = figure.add_axes((0.16, 0.5 / height, 0.81, 1 - 1.35 / height))
    for place, row in enumerate(rows):
        colour = ACCENT if row["knows_teacher"] else INK
        axes.plot(row["test_by_repeat"], [place] * row["repeats"], "o", color=PALE, ms=4)
        axes.plot(row["test"], place, "D", color=colour, ms=5.5)
        if "interval" in row:
            base = row["test"] - row["difference"]
            low, high = (base + edge for edge in row["interval"])
            axes.plot([low, high], [place, place], color=colour, lw=1.4)
    if rows:
        _reference_line(axes, found, rows)
    axes.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    axes.tick_params(axis="y", labelsize=8, length=0, labelcolor=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("test loss, nats a token")
    axes.grid(axis="x", color=PALE, lw=0.5)
    note = "diamond: mean of the repeats (grey); black: has seen nothing of the teacher"
    if found["reference"]:
        note += f"; bar: 95 % interval of the difference to {found['reference']}"
    title(figure, "Each arm at its best learning rate", note)
    return figure


def _reference_line(axes: Any, found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Student and teacher, as lines where they lie near the arms, else as words at the edge."""
    values = [loss for row in rows for loss in row["test_by_repeat"]]
    low, high = min(values), max(values)
    room = max(high - low, 1e-3 * abs(high))
    axes.set_xlim(low - 0.35 * room, high + 0.35 * room)
    for name in ("student", "teacher"):
        value = found[name]
        if value is None:
            continue
        near = low - 0.3 * room <= value <= high + 0.3 * room
        if near:
            axes.axvline(value, color=WINDOW, lw=1.0, ls=(0, (4, 3)))
        right = value > high if not near else value > (low + high) / 2
        arrow = "" if near else " →" if right else "← "
        text = f"{name} {value:.4f}{arrow}" if right or near else f"{arrow}{name} {value:.4f}"
        at = (value if near else axes.get_xlim()[1 if right else 0], -0.6)
        axes.annotate(
            text, at, (0, 4), textcoords="offset points", color=WINDOW, fontsize=7.5,
            ha="center" if near else "right" if right else "left", va="bottom",
        )  # fmt: skip


def _rates(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation loss against learning rate, one line an arm."""
    figure = Figure(figsize=(WIDTH, 4.6))
    axes = figure.add_axes((0.065, 0.12, 0.70, 0.72))
    for index, row in enumerate(rows):
        points = [(rate, loss) for rate, loss in row["validation_by_rate"] if loss is not None]
        if not points:
            continue
        colour = _COLOURS[index % len(_COLOURS)]
        dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        axes.plot(*zip(*points, strict=True), dash, color=colour, lw=1.3, marker="o", ms=3.5,
                  label=row["arm"])  # fmt: skip
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, "o", color=colour, ms=7, mfc="none")
    losses = [loss for row in rows for _, loss in row["validation_by_rate"] if loss is not None]
    if losses:  # a rate that nearly diverged must not flatten the rest
        low, ceiling = min(losses), sorted(losses)[max(0, round(0.8 * len(losses)) - 1)]
        axes.set_ylim(low - 0.05 * (ceiling - low + 1e-6), ceiling + 0.15 * (ceiling - low + 1e-6))
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss, nats a token")
    axes.grid(axis="y", color=PALE, lw=0.5)
    if losses:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, labelcolor=QUIET)
    title(figure, "Loss against learning rate", "one repeat a point; ringed: the rate chosen")
    return figure
