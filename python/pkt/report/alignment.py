"""A pair's quality report as two pictures and one page: layers alike, mapped states."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pkt.errors import OutputError
from pkt.report.pictures import HEAT, INK, PALE, QUIET, STYLE, WIDTH, WINDOW, as_png, title

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#22272e")


def write_alignment(folder: Path, found: Mapping[str, Any]) -> Path:
    """Write ``similarity.png``, ``lens.png`` and ``index.html``, and return the page's path.

    Args:
        folder: where to write; made if missing.
        found: the report's ``pkt_manifest.json``.

    Raises:
        OutputError: the folder cannot be written.

    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        pictures = {"similarity.png": as_png(_similarity(found)), "lens.png": as_png(_lens(found))}
    source = resources.files("pkt").joinpath("data/alignment.html.j2").read_text(encoding="utf-8")
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


def _similarity(found: Mapping[str, Any]) -> Figure:
    note = "linear CKA of hidden states, unbiased; orange: the pairing"
    if any(pair["unlike"] for pair in found["pairs"]):
        note += "; diamond: one of the two slides over a window, the other does not"
    return layer_map(
        found["similarity"], found["pairs"], "How alike the layers of both models are", note
    )


def layer_map(
    similarity: Any,
    pairs: Sequence[Mapping[str, Any]],
    heading: str,
    note: str,
    *,
    norm: Normalize | None = None,
    colours: Any = HEAT,
) -> Figure:
    """Teacher layer × student layer, the pairing drawn over it.

    Args:
        similarity: (L_T, L_S) numbers, as lists or as an array.
        pairs: teacher and student layer, from 1; ``unlike`` ones are drawn as diamonds.
        heading: what is shown.
        note: the line below it.
        norm: of the colours; ``None``: from 0, or the lowest, to the highest.
        colours: colour map.

    """
    values = np.asarray(similarity, dtype=np.float64)
    deep, shallow = values.shape
    across = WIDTH - 1.9  # inches; the deeper model runs along the page
    height = min(max(across * shallow / deep, 1.6), 6.0)
    figure = Figure(figsize=(WIDTH, height + 1.45))
    whole = height + 1.45
    axes = figure.add_axes((0.7 / WIDTH, 0.5 / whole, across / WIDTH, height / whole))
    if norm is None:
        norm = Normalize(min(0.0, float(values.min())), max(float(values.max()), 1e-6))
    axes.imshow(
        values.T, cmap=colours, norm=norm, aspect="auto", origin="lower", interpolation="nearest",
        extent=(0.5, deep + 0.5, 0.5, shallow + 0.5),
    )  # fmt: skip
    for pair in pairs:
        axes.plot(
            pair["teacher"], pair["student"], "D" if pair.get("unlike") else "s", mfc="none",
            mec=WINDOW, mew=1.6, ms=max(4.0, min(14.0, 300 / deep)),
        )  # fmt: skip
    axes.spines[:].set_visible(False)
    axes.set(xlabel="teacher layer", ylabel="student layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    scale = figure.add_axes((1 - 0.85 / WIDTH, 0.5 / whole, 0.1 / WIDTH, height / whole))
    bar = figure.colorbar(ScalarMappable(norm, colours), cax=scale)
    bar.outline.set_visible(False)
    title(figure, heading, note)
    return figure


def _lens(found: Mapping[str, Any]) -> Figure:
    """Centred logit-lens cosine and top tokens in common, by paired layer, a line a map."""
    figure = Figure(figsize=(WIDTH, 4.4))
    places = [pair["student"] for pair in found["pairs"]]
    panels = (
        (0.06, "cosine", "centred logit-lens cosine"),
        (0.48, "top1", "same top token, share"),
    )
    for left, key, label in panels:
        axes = figure.add_axes((left, 0.13, 0.35, 0.68))
        for colour, (name, each) in zip(_COLOURS, found["maps"].items(), strict=False):
            axes.plot(places, each[key], color=colour, lw=1.4, marker="o", ms=3.5, label=name)
        low = min(0.0, *(value for each in found["maps"].values() for value in each[key]))
        axes.set_ylim(low - 0.02, 1.02)
        axes.set(xlabel="student layer", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        axes.grid(axis="y", color=PALE, lw=0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.04, 1.0), frameon=False, labelcolor=INK)
    figure.text(0.855, 0.14, "1: nothing is lost", color=QUIET, fontsize=7.5)
    title(
        figure,
        "What mapped states say",
        "logits of mapped teacher states in the student, against those of the states themselves",
    )
    return figure
