"""Which teacher layers the answers hang on, as one picture and one page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from pkt.errors import OutputError
from pkt.report.pictures import ACCENT, PALE, STYLE, WIDTH, as_png, title

PICTURE = "attribution.png"


def write_attribution(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write ``attribution.png`` and ``index.html``, and return the page's path.

    Args:
        folder: where to write; made if missing.
        found: the manifest of targets whose pairs were attributed.

    Raises:
        OutputError: the folder cannot be written.

    """
    ranked = ranking(found)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        picture = as_png(_ranked(found, ranked))
    source = resources.files("pkt").joinpath("data/attribution.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    text = page.render(found=found, ranked=ranked, image=base64.b64encode(picture).decode())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PICTURE).write_bytes(picture)
        (folder / "index.html").write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written: {error.strerror}") from error
    return folder / "index.html"


def ranking(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Teacher layers from 1, the one of highest A first, and the student layer each is paired with.

    Args:
        found: the manifest.

    """
    scores = found["attribution"]["scores"]
    paired = {pair["teacher"]: pair["student"] for pair in found["pairs"]}
    order = sorted(range(1, len(scores) + 1), key=lambda layer: (-scores[layer - 1], layer))
    return [
        {"layer": layer, "score": scores[layer - 1], "student": paired.get(layer)}
        for layer in order
    ]


def _ranked(found: Mapping[str, Any], ranked: list[dict[str, Any]]) -> Figure:
    """A bar a layer: above by rank, below by depth."""
    figure = Figure(figsize=(WIDTH, 5.4))
    count = len(ranked)
    panels = (
        (0.56, ranked, "teacher layer, by rank"),
        (0.10, sorted(ranked, key=lambda each: int(each["layer"])), "teacher layer, by depth"),
    )
    side = max(0.6, 4 - count / 2)  # few bars would else be walls
    room = 0.925 * WIDTH * 72 / (count - 1 + 2 * side)  # points for each bar
    label = {"fontsize": 7} if room > 13 else {"fontsize": min(7.0, room), "rotation": 90}
    for bottom, bars, words in panels:
        axes = figure.add_axes((0.065, bottom, 0.925, 0.31))
        scores = [each["score"] for each in bars]
        colours = [PALE if each["student"] is None else ACCENT for each in bars]
        axes.bar(range(count), scores, width=0.78, color=colours)
        for place, each in enumerate(bars):
            if each["student"] is not None:
                axes.annotate(
                    str(each["student"]), (place, each["score"]), (0, 3),
                    textcoords="offset points", ha="center", va="bottom", color=ACCENT, **label,
                )  # fmt: skip
        axes.set_xlim(-side, count - 1 + side)
        axes.set_ylim(0, 1.16 * max(*scores, 1e-30))
        axes.set_xticks(range(count), [str(each["layer"]) for each in bars], **label)
        axes.set(xlabel=words, ylabel="A")
    summed = "Σ|a·∂L/∂a|" if found["states"]["attribution"]["absolute"] else "|Σ a·∂L/∂a|"
    note = (
        f"A: mean of {summed} over {found['attribution']['examples']} examples; blue: paired, "
        "below the number of the student layer"
    )
    title(figure, "What the teacher's layers add to its answers", note)
    return figure
