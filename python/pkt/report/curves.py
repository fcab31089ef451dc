"""A finished training run as one picture and one page: loss by step, held-out loss beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pkt.errors import OutputError
from pkt.report.alignment import layer_map
from pkt.report.pictures import ACCENT, INK, PALE, QUIET, STYLE, WIDTH, WINDOW, as_png, title

Metrics = Sequence[Mapping[str, float]]


def write_curves(folder: Path, manifest: Mapping[str, Any], metrics: Metrics) -> Path:
    """Write ``loss.png`` and ``index.html``, which embeds it, and return the page's path.

    Where the manifest tells how alike the layers of teacher and student are, three heat maps join:
    ``similarity_before.png``, ``similarity_after.png`` and ``similarity_change.png``.

    Args:
        folder: where to write; made if missing.
        manifest: the training run's ``pkt_manifest.json``.
        metrics: rows with ``step`` and ``loss``, ``learning_rate`` or ``eval_loss``.

    Raises:
        OutputError: the folder cannot be written.

    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        pictures = {"loss.png": as_png(_losses(metrics, manifest["options"].get("objective")))}
        if "similarity" in manifest:
            pictures |= {name: as_png(made) for name, made in _similarities(manifest).items()}
    page = _page(manifest, metrics, pictures)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (folder / name).write_bytes(picture)
        (folder / "index.html").write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written: {error.strerror}") from error
    return folder / "index.html"


def _losses(metrics: Metrics, objective: str | None) -> Figure:
    """An objective of activations has a unit of its own: the held-out loss then has an axis too."""
    figure = Figure(figsize=(WIDTH, 5.4))
    width = 0.86 if objective else 0.925
    upper = figure.add_axes((0.065, 0.36, width, 0.50))
    lower = figure.add_axes((0.065, 0.09, width, 0.17), sharex=upper)
    steps, losses = _column(metrics, "loss")
    upper.plot(steps, losses, color=PALE, lw=1)
    upper.plot(steps, _smoothed(losses), color=ACCENT, lw=1.6)
    _label(upper, steps, _smoothed(losses), "training, smoothed", ACCENT)
    at, held_out = _column(metrics, "eval_loss")
    if at.size:
        held = upper.twinx() if objective else upper
        if objective:
            held.set_ylabel("held-out loss, nats a token")
        held.plot(at, held_out, color=WINDOW, lw=1.2, marker="o", ms=4)
        held.axhline(held_out[0], color=QUIET, lw=0.8, ls=(0, (4, 3)))
        held.annotate(
            "the student, held out", (steps[-1], held_out[0]), (0, 3),
            textcoords="offset points", ha="right", color=QUIET, fontsize=7.5,
        )  # fmt: skip
        _label(held, at, held_out, "held out", WINDOW)
    _mark_stages(upper, metrics)
    upper.set_ylabel(f"loss of {objective}" if objective else "loss, nats a token")
    upper.grid(axis="y", color=PALE, lw=0.5)
    upper.tick_params(labelbottom=False)
    rate_steps, rates = _column(metrics, "learning_rate")
    lower.plot(rate_steps, rates, color=INK, lw=1.2)
    lower.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    lower.grid(axis="y", color=PALE, lw=0.5)
    title(figure, "Loss by step", "grey: each step's own examples; blue: their moving average")
    return figure


def _similarities(manifest: Mapping[str, Any]) -> dict[str, Figure]:
    """Teacher layer × student layer before and after, in the same colours, and what changed."""
    found = manifest["similarity"]
    before, after = (np.asarray(found[name], dtype=np.float64) for name in ("before", "after"))
    pairs = _paired(manifest)
    low, high = (float(f([f(before), f(after)])) for f in (np.min, np.max))
    both, most = Normalize(min(0.0, low), max(high, 1e-6)), max(np.abs(after - before).max(), 1e-4)
    note = f"linear CKA of hidden states at {found['positions']} answer tokens; orange: the pairing"
    return {
        "similarity_before.png": layer_map(
            before, pairs, "How alike the layers are, before training", note, norm=both
        ),
        "similarity_after.png": layer_map(
            after, pairs, "How alike the layers are, after training", note, norm=both
        ),
        "similarity_change.png": layer_map(
            after - before, pairs, "What training changed",
            "after less before; green: more alike; orange: the pairing",
            norm=Normalize(-most, most), colours="PRGn",
        ),
    }  # fmt: skip


def _mark_stages(axes: Any, metrics: Metrics) -> None:
    """Where the next layer's turn begins, and which it is."""
    steps, layers = _column(metrics, "layer")
    for number, layer in enumerate(layers):
        if number and layer == layers[number - 1]:
            continue
        axes.axvline(steps[number] - 0.5, color=QUIET, lw=0.6)
        axes.annotate(
            f"layer {layer:g}", (steps[number] - 0.5, 1), (3, -9), textcoords="offset points",
            xycoords=("data", "axes fraction"), color=QUIET, fontsize=7.5,
        )  # fmt: skip


def _label(axes: Any, x: Any, y: Any, text: str, colour: str) -> None:
    """A curve's name above its end."""
    axes.annotate(
        text, (x[-1], y[-1]), (0, 6), textcoords="offset points", ha="right", color=colour,
        fontsize=8, fontweight="bold",
    )  # fmt: skip


def _column(metrics: Metrics, name: str) -> tuple[Any, Any]:
    rows = [row for row in metrics if name in row]
    return np.array([row["step"] for row in rows]), np.array([row[name] for row in rows])


def _smoothed(values: Any) -> Any:
    """Exponential moving average over about a twentieth of the run, without a start-up bias."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight, smooth = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return np.array(smooth)


def _page(manifest: Mapping[str, Any], metrics: Metrics, pictures: Mapping[str, bytes]) -> str:
    source = resources.files("pkt").joinpath("data/curves.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    options = {
        name.replace("_", "-"): value if isinstance(value, str) else json.dumps(value)
        for name, value in sorted(manifest["options"].items())
        if value is not None
    }
    return page.render(
        manifest=manifest,
        options=options,
        held_out=[row for row in metrics if "eval_loss" in row],
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        alike=_pairs(manifest),
    )


def _pairs(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each pair's similarity before and after."""
    if "similarity" not in manifest:
        return []
    found = manifest["similarity"]
    return [
        dict(pair)
        | {
            name: found[name][pair["teacher"] - 1][pair["student"] - 1]
            for name in ("before", "after")
        }
        for pair in _paired(manifest)
    ]


def _paired(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pairs, as a run with a teacher in memory tells them, or of its targets."""
    if "pairs" in manifest:
        return list(manifest["pairs"])
    return [{"teacher": pair[0], "student": pair[1]} for pair in manifest["targets"]["pairs"]]
