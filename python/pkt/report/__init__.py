"""A finished extraction as pictures and one page: which layers, which windows, which spectra.

Everything comes from the manifest and from the binned scores that the sweep kept: no model is
opened and no score is computed here. The page embeds its pictures, so that the one file can be
mailed; it refers to nothing outside, and no time, version, path or host stands in it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from pkt.errors import OutputError
from pkt.records import Heat
from pkt.report.alignment import write_alignment
from pkt.report.attribution import ranking, write_attribution
from pkt.report.comparison import write_comparison
from pkt.report.curves import write_curves
from pkt.report.overview import write_overview
from pkt.report.pictures import draw, is_listed

__all__ = [
    "ranking",
    "write_alignment",
    "write_attribution",
    "write_comparison",
    "write_curves",
    "write_overview",
    "write_report",
]

_MAPS = "sensitivity_"  # what the names of pictures of scores begin with


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
    pictures = draw(manifest, heat, spectra, energy)
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


def _page(
    manifest: Mapping[str, Any], energy: Mapping[str, float], pictures: Mapping[str, bytes]
) -> str:
    """``index.html``: tables and pictures in one file."""
    source = resources.files("pkt").joinpath("data/report.html.j2").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    options = {
        name.replace("_", "-"): value if isinstance(value, str) else json.dumps(value)
        for name, value in sorted(manifest["options"].items())
        if value is not None
    }
    select = manifest["options"]["select"]
    windows = []
    for key, window in manifest["windows"].items():
        shown = {
            axis: _indices(window.get(axis), is_listed(key, select, axis))
            for axis in ("rows", "cols")
        }
        module = key.partition("#")[0]  # the factors of a fused module are those of all its parts
        kept = energy.get(key, energy.get(module))
        windows.append({"kv_repeat": 1, **window, **shown, "student": key, "energy": kept})
    images = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    return page.render(
        manifest=manifest,
        options=options,
        windows=windows,
        energy=bool(energy),
        overview={name: data for name, data in images.items() if not name.startswith(_MAPS)},
        maps={name: data for name, data in images.items() if name.startswith(_MAPS)},
    )


def _indices(indices: Sequence[int] | None, listed: bool) -> str:
    if indices is None:
        return "single weights"
    if not listed:
        return f"{indices[0]}:{indices[1]}"
    if len(indices) <= 6:
        return ", ".join(map(str, indices))
    return f"{', '.join(map(str, indices[:3]))}, … {indices[-1]} ({len(indices)})"
