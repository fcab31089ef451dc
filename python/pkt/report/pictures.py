"""The report's pictures: layer scores, sensitivity with its windows, spectra.

Each is drawn from the manifest and from binned scores alone. Equal input gives equal bytes:
matplotlib's own defaults stand instead of the user's style, no picture holds a date or a version,
and pyplot with its global state is not loaded.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator

from pkt.records import Heat

INK, QUIET, PALE, ACCENT, WINDOW = "#22272e", "#6b7480", "#cfd6de", "#2b6cb0", "#d9480f"
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7fafc", "#a9cbe6", "#3d83bd", "#0f2f57"], 64)
CHOSEN = LinearSegmentedColormap.from_list("chosen", ["#ffffff", WINDOW])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#9bd0c2", "#2b7fb0", "#2a2a66"])
STYLE = {
    "font.size": 8, "text.color": INK, "savefig.dpi": 128,
    "axes.edgecolor": PALE, "axes.labelcolor": QUIET, "axes.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": PALE, "ytick.color": PALE, "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.formatter.useoffset": False,
}  # fmt: skip
WIDTH = 11.0  #: of every picture, in inches
LEFT, PITCH, SIDE = 0.625, 2.5, 2.0  #: of panels in a row; at 128 dpi each of 64 bins is 4 pixels

OUTSIDE = -1  #: stands for a layer where a module lies in none

Array = npt.NDArray[np.float64]
Box = tuple[float, float, float, float]  #: left, bottom, width, height


def draw(
    manifest: Mapping[str, Any],
    heat: Mapping[str, Heat],
    spectra: Mapping[str, Sequence[float]],
    energy: Mapping[str, float],
) -> dict[str, bytes]:
    """All pictures as PNG, by file name, in the order of the page; arguments: `write_report`."""
    by_layer: dict[int, list[str]] = defaultdict(list)
    for key in manifest["windows"]:
        if key in heat:
            by_layer[_layer(key)].append(key)
    digits = max(2, len(str(len(manifest["layers"]) - 1)))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        pictures = {"layer_scores.png": as_png(_layer_scores(manifest))}
        if spectra:
            pictures["spectra.png"] = as_png(_spectra(spectra, energy))
        if outside := by_layer.pop(OUTSIDE, []):
            pictures["sensitivity_embeddings.png"] = as_png(_profiles(manifest, heat, outside))
        for layer, keys in sorted(by_layer.items()):
            name = f"sensitivity_layer_{layer:0{digits}d}.png"
            pictures[name] = as_png(_sensitivity(manifest, heat, keys, layer))
    return pictures


def _layer_scores(manifest: Mapping[str, Any]) -> Figure:
    scores, kept = list(manifest["layer_scores"]), list(manifest["layers"])
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.add_axes((0.065, 0.14, 0.925, 0.62))
    side = max(0.6, 4 - len(scores) / 2)  # few bars would else be walls
    room = 0.925 * WIDTH * 72 / (len(scores) - 1 + 2 * side)  # points for each bar
    label = {"fontsize": 8} if room > 13 else {"fontsize": min(7.0, room), "rotation": 90}
    colours = [PALE] * len(scores)
    for student, teacher in enumerate(kept):
        colours[teacher] = ACCENT
        axes.annotate(
            str(student), (teacher, scores[teacher]), (0, 3), textcoords="offset points",
            ha="center", va="bottom", color=ACCENT, **label,
        )  # fmt: skip
    axes.bar(range(len(scores)), scores, width=0.78, color=colours)
    axes.set_xlim(-side, len(scores) - 1 + side)
    axes.set_ylim(0, 1.12 * max(*scores, 1e-30))
    axes.set(xlabel="teacher layer", ylabel="Σ |θ·∂L/∂θ|")
    step = next(step for step in (1, 2, 5, 10, len(scores)) if len(scores) <= 32 * step)
    axes.set_xticks(range(0, len(scores), step))
    note = f"blue: the {len(kept)} of {len(scores)} layers that are kept, each below the number "
    title(figure, "Sensitivity of the teacher's layers", note + "of the student layer it feeds")
    return figure


def _sensitivity(
    manifest: Mapping[str, Any], heat: Mapping[str, Heat], keys: Sequence[str], layer: int
) -> Figure:
    """One panel for each projection of a student layer, all on one colour scale."""
    select = manifest["options"]["select"]
    low, high = _log_range(np.concatenate([_bins(heat[key]).ravel() for key in keys]))
    norm = LogNorm(low, high)
    figure, panels = _grid(len(keys))
    for axes, key in zip(panels, keys, strict=True):
        scores, window = heat[key], manifest["windows"][key]
        values = np.maximum(_bins(scores), low)
        extent = (0, scores.cols, scores.rows, 0)
        axes.imshow(
            values, cmap=HEAT, norm=norm, aspect="auto", extent=extent, interpolation="nearest"
        )
        axes.spines[:].set_visible(False)
        axes.set(xlabel="column", ylabel="row" if axes in panels[::4] else "")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
        lines, above = _mark(axes, scores, window, is_listed(key, select))
        repeat = window.get("kv_repeat", 1)
        name = _kind(key) + (f"  (kv heads × {repeat})" if repeat > 1 else "")
        _heading(axes, name, lines, above)
    _colour_bar(figure, ScalarMappable(norm, HEAT))
    shown = {
        "rows-cols": "orange margins: how densely rows and columns are chosen",
        "consistent": "orange margins: how densely channels, heads and neurons are chosen",
        "top-weights": "single weights are chosen, so no window is outlined",
        "random-weights": "single weights are chosen, so no window is outlined",
    }.get(select, "outlined: the window that the student takes")
    title(
        figure,
        f"Student layer {layer} from teacher layer {manifest['layers'][layer]}",
        f"mean |θ·∂L/∂θ| of a weight, by bin, log scale; {shown}",
    )
    return figure


def _mark(
    axes: Any, heat: Heat, window: Mapping[str, Any], listed: bool
) -> tuple[list[str], float]:
    """Show on a panel what is taken of it; returns the lines above it, and by how many points."""
    rows, cols = window.get("rows"), window.get("cols")
    if rows is None or cols is None:
        return ["single weights: no window"], 0
    if listed:
        _margin(axes, (0, 1.015, 1, 0.04), _share(cols, heat.cols)[None, :])
        _margin(axes, (1.015, 0, 0.04, 1), _share(rows, heat.rows)[:, None])
        return [f"{len(rows)} of {heat.rows} rows · {len(cols)} of {heat.cols} columns"], 8
    size = cols[1] - cols[0], rows[1] - rows[0]
    frame = Rectangle((cols[0], rows[0]), *size, fill=False, clip_on=False)
    frame.set(edgecolor=WINDOW, linewidth=1.8)
    axes.add_patch(frame)
    lines = [
        f"rows {rows[0]}:{rows[1]} of {heat.rows}",
        f"columns {cols[0]}:{cols[1]} of {heat.cols}",
    ]
    return lines, 0


def _profiles(manifest: Mapping[str, Any], heat: Mapping[str, Heat], keys: list[str]) -> Figure:
    """Embeddings and head, whose window slides over the hidden axis alone: one curve each."""
    height = 0.8 + 1.75 * len(keys)
    figure = Figure(figsize=(WIDTH, height))
    for index, key in enumerate(keys):
        scores, cols = heat[key], manifest["windows"][key]["cols"]
        bottom = (height - 2.2 - 1.75 * index) / height
        axes = figure.add_axes((0.065, bottom, 0.925, 1.0 / height))
        values = _bins(scores).mean(axis=0)
        low, high = _log_range(values)
        edges = np.linspace(0, scores.cols, len(values) + 1)
        values = np.maximum(values, low)
        axes.stairs(values, edges, baseline=low / 1.5, fill=True, color="#a9cbe6")
        axes.set(yscale="log", xlim=(0, scores.cols), ylim=(low / 1.5, high * 1.5))
        axes.set(xlabel="column" if key == keys[-1] else "", ylabel="mean |θ·∂L/∂θ|")
        _log_ticks(axes)
        if is_listed(key, manifest["options"]["select"], "cols"):
            _margin(axes, (0, 1.03, 1, 0.08), _share(cols, scores.cols)[None, :])
            _heading(axes, key, [f"{len(cols)} of {scores.cols} columns"], 8)
        else:
            axes.axvspan(*cols, facecolor=WINDOW, alpha=0.12, zorder=0)
            axes.vlines(cols, *axes.get_ylim(), color=WINDOW, linewidth=1.8, clip_on=False)
            _heading(axes, key, [f"columns {cols[0]}:{cols[1]} of {scores.cols}"])
    title(
        figure,
        "Embeddings and head",
        "mean |θ·∂L/∂θ| of a weight, by column, log scale; orange: what the student takes",
    )
    return figure


def _spectra(spectra: Mapping[str, Sequence[float]], energy: Mapping[str, float]) -> Figure:
    """One panel for each kind of module, one line for each layer."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in spectra:
        kinds[_kind(key)].append(key)
    depth = Normalize(0, max(1, *map(_layer, spectra)), clip=True)
    figure, panels = _grid(len(kinds))
    for axes, (kind, keys) in zip(panels, kinds.items(), strict=True):
        for key in keys:
            values = np.asarray(spectra[key], np.float64)
            values = np.where(values > 0, values, np.nan)  # a log axis has no place for zero
            colour = DEPTH(depth(_layer(key)))
            marker = "o" if len(values) < 3 else None
            axes.plot(range(1, len(values) + 1), values, color=colour, lw=1.1, ms=3, marker=marker)
        axes.set(yscale="log", xlabel="index")
        axes.set_ylabel("singular value" if axes in panels[::4] else "")
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        _log_ticks(axes)
        shares = [energy[key] for key in keys if key in energy]
        lines = [f"‖BA‖/‖W‖ {np.mean(shares):.2f}"] if shares else []
        if len(shares) > 1:
            lines = [f"{lines[0]}  ({min(shares):.2f} to {max(shares):.2f})"]
        _heading(axes, kind, lines)
    _colour_bar(figure, ScalarMappable(depth, DEPTH), "student layer")
    title(
        figure,
        "Singular values of the windows",
        "the leading ones, by kind of module; ‖BA‖/‖W‖: what the factors keep of a window's norm",
    )
    return figure


def _grid(count: int) -> tuple[Figure, list[Any]]:
    """A figure of up to four panels a line, with room for titles and, at the right, a scale."""
    lines = -(-count // 4)
    height = 0.5 + 3.0 * lines
    figure = Figure(figsize=(WIDTH, height))
    panels: list[Any] = []
    for index in range(count):
        line, column = divmod(index, 4)
        box = (LEFT + PITCH * column, height - 3.125 - 3.0 * line, SIDE, SIDE)
        panels.append(figure.add_axes(_inches(figure, box)))
    return figure, panels


def _inches(figure: Figure, box: Box) -> Box:
    """A box given in inches, as fractions of the figure."""
    width, height = figure.get_size_inches()
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _colour_bar(figure: Figure, colours: ScalarMappable, label: str = "") -> None:
    columns = min(4, len(figure.axes))
    height = figure.get_size_inches()[1]
    left = LEFT + PITCH * (columns - 1) + SIDE + 0.1875
    axes = figure.add_axes(_inches(figure, (left, height - 3.125, 0.1, SIDE)))
    bar = figure.colorbar(colours, cax=axes, label=label)
    bar.outline.set_visible(False)
    if label:
        bar.locator = MaxNLocator(nbins=6, integer=True, min_n_ticks=1)


def _margin(axes: Any, bounds: Box, share: Array) -> None:
    """A strip beside a panel, darker where more of a bin's rows or columns are chosen."""
    strip = axes.inset_axes(bounds)
    strip.imshow(share, cmap=CHOSEN, vmin=0, vmax=1, aspect="auto")
    strip.set_axis_off()


def _log_ticks(axes: Any) -> None:
    """Plain numbers on a logarithmic y axis: the coarsest steps that give three or more."""
    low, high = axes.get_ylim()
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)))
    finer = (np.arange(10, 100, step) / 10 for step in (10, 5, 2, 1))
    for steps in (np.ones(1), np.array([1.0, 2.0, 5.0]), *finer):
        ticks = (decades[:, None] * steps).ravel()
        ticks = ticks[(low <= ticks) & (ticks <= high)]
        if len(ticks) >= 3:
            break
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def title(figure: Figure, heading: str, note: str) -> None:
    """A picture's heading, and below it in grey what is drawn."""
    height = figure.get_size_inches()[1]
    left = 0.12 / WIDTH
    figure.text(left, 1 - 0.26 / height, heading, fontsize=12, fontweight="bold")
    figure.text(left, 1 - 0.48 / height, note, fontsize=8.5, color=QUIET)


def _heading(axes: Any, name: str, lines: Sequence[str], above: float = 0) -> None:
    """A panel's name in bold, over smaller lines, ``above`` points higher than the panel."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    text = "\n".join(lines)
    axes.annotate(text, (0, 1), (0, above + 6), fontsize=7, color=QUIET, **place)
    above += 8 + 9 * len(lines)
    axes.annotate(name, (0, 1), (0, above), fontsize=9.5, fontweight="bold", **place)


def as_png(figure: Figure) -> bytes:
    """A figure as a PNG file without date or version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bins(heat: Heat) -> Array:
    return np.atleast_2d(np.nan_to_num(np.asarray(heat.bins, dtype=np.float64)))


def _log_range(values: Array) -> tuple[float, float]:
    """Ends of a log scale: up to the maximum; the foot ignores zeros and the lowest 1 %."""
    positive = values[values > 0]
    if not positive.size:
        return 0.1, 1.0
    top = float(positive.max())
    return min(float(np.percentile(positive, 1)), top / 2), top


def is_listed(key: str, select: str, axis: str = "rows") -> bool:
    """Whether a window's ``rows`` or ``cols`` are a list of indices, not ``[start, stop)``.

    Embeddings and head keep every row; their columns are a run, but under ``consistent``.
    """
    if _layer(key) == OUTSIDE:
        return select == "consistent" and axis == "cols"
    return select in ("rows-cols", "consistent")


def _share(chosen: Sequence[int], size: int) -> Array:
    """The chosen share of each of up to 64 bins of an axis."""
    bins = np.arange(size) * min(64, size) // size
    return np.bincount(bins, weights=np.isin(np.arange(size), chosen)) / np.bincount(bins)


def _layer(key: str) -> int:
    """The layer that a module path lies in, or ``OUTSIDE``."""
    match = re.search(r"\.(\d+)\.", key)
    return int(match[1]) if match else OUTSIDE


def _kind(key: str) -> str:
    """What a window's key says below its layer: ``q_proj``, ``qkv_proj#q``, ``lm_head``."""
    return key.rsplit(".", 1)[-1]
