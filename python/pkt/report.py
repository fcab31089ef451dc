"""A finished extraction as pictures and one page: which layers, which windows, which spectra.

Everything drawn comes from the manifest and from the binned scores that the sweep kept: no model
is opened and no score is computed here. The page embeds its pictures, so that the one file can
be mailed. Equal input gives equal bytes: matplotlib's own defaults instead of the user's style,
no date, version, path or host in any file.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullFormatter

from pkt.errors import OutputError

INK, QUIET, PALE, ACCENT, WINDOW = "#22272e", "#6b7480", "#cfd6de", "#2b6cb0", "#d9480f"
HEAT = LinearSegmentedColormap.from_list("heat", ["#f7fafc", "#a9cbe6", "#3d83bd", "#0f2f57"])
CHOSEN = LinearSegmentedColormap.from_list("chosen", ["#ffffff", WINDOW])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#9bd0c2", "#2b7fb0", "#2a2a66"])
STYLE = {
    "font.size": 8, "text.color": INK, "savefig.dpi": 120,
    "axes.edgecolor": PALE, "axes.labelcolor": QUIET, "axes.labelsize": 8,
    "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": PALE, "ytick.color": PALE, "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET,
    "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.formatter.useoffset": False,
}  # fmt: skip
WIDTH = 11.0  #: inches, of every picture

Array = npt.NDArray[np.float64]


class Heat(Protocol):
    """Scores of one logical matrix, binned: what the report keeps of them."""

    @property
    def bins(self) -> Any:
        """Mean |θ·∂L/∂θ| per weight, by bin of equal size, 2-D; one row for embeddings."""

    @property
    def rows(self) -> int:
        """Rows of the logical matrix."""

    @property
    def cols(self) -> int:
        """Columns of the logical matrix."""


def write_report(
    folder: Path,
    manifest: Mapping[str, Any],
    heat: Mapping[str, Heat],
    spectra: Mapping[str, Sequence[float]],
    energy: Mapping[str, float] | None = None,
) -> Path:
    """Write the pictures and ``index.html``, and return the page's path.

    Pictures: ``layer_scores.png``; ``sensitivity_layer_XX.png`` for each student layer, XX being
    its index from 0; ``sensitivity_embeddings.png`` for windows outside of layers;
    ``spectra.png``. Those for which nothing is given are left out.

    Args:
        folder: where to write; made if missing.
        manifest: the extraction's ``pkt_manifest.json``.
        heat: binned scores of the teacher matrix behind a window, by key of
            ``manifest["windows"]``.
        spectra: leading singular values of a window, descending, by window key or module.
        energy: ‖BA‖_F / ‖W‖_F, the share of the window's norm that the factors keep, by the same
            keys as ``spectra``.

    Raises:
        OutputError: the folder cannot be written.

    """
    energy = energy or {}
    pictures = _draw(manifest, heat, spectra, energy)
    page = _page(manifest, energy, pictures)
    index = folder / "index.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            (folder / name).write_bytes(picture)
        index.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written: {error.strerror}") from error
    return index


def _draw(
    manifest: Mapping[str, Any],
    heat: Mapping[str, Heat],
    spectra: Mapping[str, Sequence[float]],
    energy: Mapping[str, float],
) -> dict[str, bytes]:
    """All pictures as PNG, by file name, in the order of the page."""
    by_layer: dict[int | None, list[str]] = defaultdict(list)
    for key in manifest["windows"]:
        if key in heat:
            by_layer[_layer(key)].append(key)
    digits = max(2, len(str(len(manifest["layers"]) - 1)))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        pictures = {"layer_scores.png": _png(_layer_scores(manifest))}
        if spectra:
            pictures["spectra.png"] = _png(_spectra(spectra, energy))
        if outside := by_layer.pop(None, []):
            pictures["sensitivity_embeddings.png"] = _png(_profiles(manifest, heat, outside))
        for layer, keys in sorted(by_layer.items(), key=lambda item: item[0] or 0):
            name = f"sensitivity_layer_{layer:0{digits}d}.png"
            pictures[name] = _png(_sensitivity(manifest, heat, keys, layer or 0))
    return pictures


def _layer_scores(manifest: Mapping[str, Any]) -> Figure:
    scores, kept = list(manifest["layer_scores"]), list(manifest["layers"])
    figure = Figure(figsize=(WIDTH, 3.4))
    axes = figure.add_axes((0.065, 0.14, 0.925, 0.62))
    colours = [PALE] * len(scores)
    crowded = len(scores) > 48
    for student, teacher in enumerate(kept):
        colours[teacher] = ACCENT
        axes.annotate(
            str(student), (teacher, scores[teacher]), (0, 3), textcoords="offset points",
            ha="center", va="bottom", color=ACCENT, fontweight="bold",
            rotation=90 if crowded else 0, fontsize=6.5 if crowded else 8,
        )  # fmt: skip
    axes.bar(range(len(scores)), scores, width=0.78, color=colours)
    side = max(0.6, 4 - len(scores) / 2)  # few bars would else be walls
    axes.set_xlim(-side, len(scores) - 1 + side)
    axes.set_ylim(0, 1.12 * max(*scores, 1e-30))
    axes.set(xlabel="teacher layer", ylabel="Σ |θ·∂L/∂θ|")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=22, integer=True, min_n_ticks=1))
    note = f"blue: the {len(kept)} of {len(scores)} layers that are kept, each below the number "
    _title(figure, "Sensitivity of the teacher's layers", note + "of the student layer it feeds")
    return figure


def _sensitivity(
    manifest: Mapping[str, Any], heat: Mapping[str, Heat], keys: Sequence[str], layer: int
) -> Figure:
    """One panel for each projection of a student layer, all on one colour scale."""
    select = _select(manifest)
    norm = _log_norm(np.concatenate([_bins(heat[key]).ravel() for key in keys]))
    figure, panels = _grid(len(keys))
    for axes, key in zip(panels, keys, strict=True):
        scores, window = heat[key], manifest["windows"][key]
        values = np.maximum(_bins(scores), norm.vmin)
        extent = (0, scores.cols, scores.rows, 0)
        axes.imshow(values, cmap=HEAT, norm=norm, aspect="auto", extent=extent, interpolation="nearest")
        axes.spines[:].set_visible(False)
        axes.set(xlabel="column", ylabel="row")
        rows, cols = window.get("rows"), window.get("cols")
        lines = ["single weights: no window"]
        if rows and cols:
            lines = [
                f"rows {_extent(rows, scores.rows, select)}",
                f"columns {_extent(cols, scores.cols, select)}",
            ]
            if _is_range(rows, scores.rows, select) and _is_range(cols, scores.cols, select):
                size = cols[1] - cols[0], rows[1] - rows[0]
                frame = Rectangle((cols[0], rows[0]), *size, fill=False, clip_on=False)
                frame.set(edgecolor=WINDOW, linewidth=1.8)
                axes.add_patch(frame)
            else:
                _margin(axes, (0, 1.015, 1, 0.04), _share(cols, scores.cols, select)[None, :])
                _margin(axes, (1.015, 0, 0.04, 1), _share(rows, scores.rows, select)[:, None])
        repeat = window.get("kv_repeat", 1)
        _heading(axes, _kind(key) + (f"  (kv heads × {repeat})" if repeat > 1 else ""), lines)
    _colour_bar(figure, ScalarMappable(norm, HEAT))
    shown = {
        "rows-cols": "orange margins: how densely rows and columns are chosen",
        "top-weights": "single weights are chosen, so no window is outlined",
        "random-weights": "single weights are chosen, so no window is outlined",
    }.get(select, "outlined: the window that the student takes")
    _title(
        figure,
        f"Student layer {layer} from teacher layer {manifest['layers'][layer]}",
        f"mean |θ·∂L/∂θ| of a weight, by bin, log scale; {shown}",
    )
    return figure


def _profiles(manifest: Mapping[str, Any], heat: Mapping[str, Heat], keys: list[str]) -> Figure:
    """Embeddings and head, whose window slides over the hidden axis alone: one curve each."""
    select = _select(manifest)
    height = 0.8 + 1.75 * len(keys)
    figure = Figure(figsize=(WIDTH, height))
    for index, key in enumerate(keys):
        scores, cols = heat[key], manifest["windows"][key].get("cols")
        bottom = (height - 2.3 - 1.75 * index) / height
        axes = figure.add_axes((0.065, bottom, 0.925, 1.0 / height))
        values = _bins(scores).mean(axis=0)
        norm = _log_norm(values)
        edges = np.linspace(0, scores.cols, len(values) + 1)
        floor = norm.vmin / 1.5
        axes.stairs(np.maximum(values, floor), edges, baseline=floor, fill=True, color="#a9cbe6")
        axes.set(yscale="log", xlim=(0, scores.cols), ylim=(floor, norm.vmax * 1.5))
        axes.set(xlabel="column" if key == keys[-1] else "", ylabel="mean |θ·∂L/∂θ|")
        lines = ["single weights: no window"]
        if cols:
            lines = [f"columns {_extent(cols, scores.cols, select)}"]
            if _is_range(cols, scores.cols, select):
                axes.axvspan(*cols, facecolor=WINDOW, alpha=0.12)
                axes.vlines(cols, *axes.get_ylim(), color=WINDOW, linewidth=1.8, clip_on=False)
            else:
                _margin(axes, (0, 1.02, 1, 0.06), _share(cols, scores.cols, select)[None, :])
        _heading(axes, key, lines)
    _title(
        figure,
        "Embeddings and head",
        "mean |θ·∂L/∂θ| of a weight, by column, log scale; orange: the columns that the student takes",
    )
    return figure


def _spectra(spectra: Mapping[str, Sequence[float]], energy: Mapping[str, float]) -> Figure:
    """One panel for each kind of module, one line for each layer."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for key in spectra:
        kinds[_kind(key)].append(key)
    last = max((_layer(key) or 0 for key in spectra), default=0)
    depth = Normalize(0, max(last, 1))
    figure, panels = _grid(len(kinds))
    for axes, (kind, keys) in zip(panels, kinds.items(), strict=True):
        for key in keys:
            values = np.asarray(spectra[key], np.float64)
            values = np.where(values > 0, values, np.nan)  # a log axis has no place for zero
            colour = DEPTH(depth(_layer(key) or 0))
            marker = "o" if len(values) < 3 else None
            axes.plot(range(1, len(values) + 1), values, color=colour, lw=1.1, ms=3, marker=marker)
        axes.set(yscale="log", xlabel="index i", ylabel="singular value σᵢ")
        axes.grid(axis="y", color=PALE, linewidth=0.5)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        axes.yaxis.set_minor_formatter(NullFormatter())
        shares = [energy[key] for key in keys if key in energy]
        lines = [f"‖BA‖/‖W‖ {np.mean(shares):.2f}"] if shares else []
        if len(shares) > 1:
            lines = [f"{lines[0]}  ({min(shares):.2f} to {max(shares):.2f})"]
        _heading(axes, kind, lines)
    _colour_bar(figure, ScalarMappable(depth, DEPTH), "student layer")
    _title(
        figure,
        "Singular values of the windows",
        "the leading ones, by kind of module; ‖BA‖/‖W‖: what the factors keep of a window's norm",
    )
    return figure


def _grid(count: int) -> tuple[Figure, list[Any]]:
    """A figure of up to four panels a line, with room for titles and, at the right, a scale."""
    lines = -(-count // 4)
    height = 0.55 + 3.0 * lines
    figure = Figure(figsize=(WIDTH, height))
    panels = []
    for index in range(count):
        line, column = divmod(index, 4)
        box = (0.62 + 2.48 * column, height - 3.12 - 3.0 * line, 1.95, 1.95)
        panels.append(figure.add_axes(_inches(figure, box)))
    return figure, panels


def _inches(figure: Figure, box: tuple[float, float, float, float]) -> tuple[float, ...]:
    """(left, bottom, width, height) in inches, as fractions of the figure."""
    width, height = figure.get_size_inches()
    return box[0] / width, box[1] / height, box[2] / width, box[3] / height


def _colour_bar(figure: Figure, colours: ScalarMappable, label: str = "") -> None:
    columns = min(4, len(figure.axes))
    height = figure.get_size_inches()[1]
    left = 0.62 + 2.48 * (columns - 1) + 2.13
    axes = figure.add_axes(_inches(figure, (left, height - 3.12, 0.1, 1.95)))
    bar = figure.colorbar(colours, cax=axes, label=label)
    bar.outline.set_visible(False)
    if label:
        bar.locator = MaxNLocator(nbins=6, integer=True, min_n_ticks=1)


def _margin(axes: Any, bounds: tuple[float, float, float, float], share: Array) -> None:
    """A strip beside a panel, darker where more of a bin's rows or columns are chosen."""
    strip = axes.inset_axes(bounds)
    strip.imshow(share, cmap=CHOSEN, vmin=0, vmax=1, aspect="auto")
    strip.set(xticks=[], yticks=[])


def _title(figure: Figure, title: str, note: str) -> None:
    height = figure.get_size_inches()[1]
    left = 0.12 / WIDTH
    figure.text(left, 1 - 0.26 / height, title, fontsize=12, fontweight="bold")
    figure.text(left, 1 - 0.48 / height, note, fontsize=8.5, color=QUIET)


def _heading(axes: Any, name: str, lines: Sequence[str]) -> None:
    """A panel's name in bold, and smaller lines between it and the panel."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    text = "\n".join(lines)
    above = 8 + 9.5 * len(lines)
    axes.annotate(text, (0, 1), (0, 7), fontsize=7, color=QUIET, linespacing=1.15, **place)
    axes.annotate(name, (0, 1), (0, above), fontsize=9.5, fontweight="bold", **place)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bins(heat: Heat) -> Array:
    return np.atleast_2d(np.nan_to_num(np.asarray(heat.bins, dtype=np.float64)))


def _log_norm(values: Array) -> LogNorm:
    """A log scale up to the maximum, whose foot ignores zeros and the lowest 1 % of the rest."""
    positive = values[values > 0]
    if not positive.size:
        return LogNorm(0.1, 1)
    top = float(positive.max())
    return LogNorm(min(float(np.percentile(positive, 1)), top / 2), top)


def _select(manifest: Mapping[str, Any]) -> str:
    return str(manifest["options"].get("select", "window"))


def _is_range(indices: Sequence[int], size: int, select: str) -> bool:
    """Whether ``indices`` is ``[start, stop)`` of an axis of ``size``, and not a list of indices.

    Only ``rows-cols`` writes lists, and no list holds ``size`` itself.
    """
    return len(indices) == 2 and (select != "rows-cols" or indices[1] == size)


def _share(indices: Sequence[int], size: int, select: str) -> Array:
    """The chosen share of each of up to 64 bins of an axis."""
    chosen = range(*indices) if _is_range(indices, size, select) else indices
    bins = np.arange(size) * min(64, size) // size
    return np.bincount(bins, weights=np.isin(np.arange(size), chosen)) / np.bincount(bins)


def _extent(indices: Sequence[int], size: int, select: str) -> str:
    if _is_range(indices, size, select):
        return f"{indices[0]}:{indices[1]} of {size}"
    return f"{len(indices)} chosen of {size}"


def _layer(key: str) -> int | None:
    """The layer that a module path lies in; ``None`` outside of the layers."""
    match = re.search(r"\.(\d+)\.", key)
    return int(match[1]) if match else None


def _kind(key: str) -> str:
    """What a window's key says below its layer: ``q_proj``, ``qkv_proj#q``, ``lm_head``."""
    return key.rsplit(".", 1)[-1]


def _page(
    manifest: Mapping[str, Any], energy: Mapping[str, float], pictures: Mapping[str, bytes]
) -> str:
    """``index.html``: tables and pictures in one file, without a reference to any other."""
    source = resources.files("pkt").joinpath("data/report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    options = {
        name.replace("_", "-"): value if isinstance(value, str) else json.dumps(value)
        for name, value in sorted(manifest["options"].items())
    }
    select = _select(manifest)
    windows = [
        window
        | {"student": key, "energy": energy.get(key)}
        | {axis: _indices(window.get(axis), select) for axis in ("rows", "cols")}
        for key, window in manifest["windows"].items()
    ]
    return page.render(
        manifest=manifest,
        options=options,
        windows=windows,
        select=select,
        energy=bool(energy),
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
    )


def _indices(indices: Sequence[int] | None, select: str) -> str:
    if not indices:
        return "single weights"
    if select != "rows-cols":
        return f"{indices[0]}:{indices[1]}"
    if len(indices) <= 6:
        return ", ".join(map(str, indices))
    return f"{', '.join(map(str, indices[:3]))}, … {indices[-1]} ({len(indices)})"
