import base64
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from pkt.errors import OutputError
from pkt.records import Heat
from pkt.report import pictures, write_report

pytestmark = pytest.mark.usefixtures("pictures")
SHAPES = {
    "self_attn.qkv_proj#q": (64, 64, 32, 32),
    "self_attn.qkv_proj#k": (32, 64, 16, 32),
    "mlp.down_proj": (64, 172, 32, 88),
}


def example(select="window", teacher_layers=5, kept=(0, 2, 4), fill=None, embeddings=True):
    """A manifest, its heat and its spectra: made up, in the shape of real ones."""
    rng = np.random.default_rng(0)
    windows, heat, spectra = {}, {}, {}
    for student, teacher in enumerate(kept):
        for suffix, (rows, cols, n, m) in SHAPES.items():
            key = f"model.layers.{student}.{suffix}"
            window = {"teacher": f"model.layers.{teacher}.{suffix}", "score": 1.5, "kv_repeat": 1}
            if select in ("rows-cols", "consistent"):
                window |= {"rows": list(range(0, rows, rows // n))[:n], "cols": list(range(m))}
            elif select == "top-weights":
                window |= {"mask_sha256": "ab" * 32}
            else:
                window |= {"rows": [3, 3 + n], "cols": [cols - m, cols]}
            bins = (
                rng.lognormal(size=(min(64, rows), 64)) if fill is None else np.full((9, 7), fill)
            )
            windows[key], heat[key] = window, Heat(bins, rows, cols)
            spectra[key] = [3.0, 2.0, 1.0, 0.0]
    if embeddings:
        window = {"teacher": "model.embed_tokens", "score": 9.0, "rows": [0, 512], "cols": [5, 37]}
        if select == "consistent":
            window["cols"] = list(range(1, 64, 2))
        windows["model.embed_tokens"] = window
        heat["model.embed_tokens"] = Heat(rng.lognormal(size=(1, 64)).tolist(), 512, 64)
        spectra["model.embed_tokens"] = [4.0]
    model = {"family": "llama", "layers": 5, "config_sha256": "c" * 64, "headers_sha256": "d" * 64}
    manifest = {
        "format": 1,
        "pkt": "0.1.0",
        "method": "seeking",
        "teacher": model,
        "student": model | {"family": "<b>&llama"},
        "seeds": {"count": 32, "tokens": 5000, "loss_tokens": 4968, "sha256": "e" * 64},
        "options": {"select": select, "rank": 16, "max_tokens": 2048, "embeddings": embeddings},
        "loss": 1.09,
        "layer_scores": rng.random(teacher_layers).tolist(),
        "layers": list(kept),
        "windows": windows,
    }
    return manifest, heat, spectra


class Page(HTMLParser):
    """Tags that were opened and not closed, cells, images, and whatever points elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.links = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in {"meta", "img"}:
            self.open.append(tag)
        if tag == "img":
            kind, content = attributes["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            self.images[attributes["alt"]] = base64.b64decode(content, validate=True)
        self.links += [attributes[name] for name in ("href", "xlink:href") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text.append(text)


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("select", ["window", "rows-cols", "top-weights", "consistent"])
def test_the_page_holds_every_picture_and_points_nowhere(tmp_path, select):
    index = write_report(tmp_path / "a" / "report", *example(select))
    assert index == tmp_path / "a" / "report" / "index.html"
    files = read(index.parent)
    text = files.pop("index.html").decode()
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert "http" not in text
    assert "url(" not in text
    assert page.images == files
    assert set(files) == {
        "layer_scores.png",
        "spectra.png",
        "sensitivity_embeddings.png",
        *(f"sensitivity_layer_{layer:02d}.png" for layer in range(3)),
    }
    for picture in files.values():
        assert imread(io.BytesIO(picture)).shape[1] == 1408


def test_values_are_escaped_and_keys_with_a_hash_are_shown(tmp_path):
    text = write_report(tmp_path, *example()).read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;llama" in text
    assert "<b>" not in text
    cells = Page(text).text
    assert cells.count("model.layers.0.self_attn.qkv_proj#q") == 2
    assert "c" * 12 in cells
    assert "c" * 13 not in text


@pytest.mark.parametrize(
    ("select", "cells"),
    [
        ("window", ["3:35", "84:172", "0:512", "5:37"]),
        ("rows-cols", ["0, 2, 4, … 62 (32)", "0, 1, 2, … 87 (88)", "0:512", "5:37"]),
        ("consistent", ["0, 2, 4, … 62 (32)", "0, 1, 2, … 87 (88)", "0:512", "1, 3, 5, … 63 (32)"]),
        ("top-weights", ["single weights"]),
    ],
)
def test_table_tells_ranges_from_lists_and_single_weights(tmp_path, select, cells):
    found = Page(write_report(tmp_path, *example(select)).read_text(encoding="utf-8")).text
    assert set(cells) <= set(found)


def test_energy_is_shown_where_it_is_known(tmp_path):
    manifest, heat, spectra = example()
    energy = {"model.layers.1.mlp.down_proj": 0.7654, "model.layers.2.self_attn.qkv_proj": 0.4321}
    without = write_report(tmp_path / "a", manifest, heat, spectra)
    given = write_report(tmp_path / "b", manifest, heat, spectra, energy)
    assert "‖BA‖" not in without.read_text(encoding="utf-8")
    cells = Page(given.read_text(encoding="utf-8")).text
    assert cells.count("0.765") == 1
    assert cells.count("0.432") == 2  # both parts of the fused module
    assert cells.count("–") == 2 + len(manifest["windows"]) - 3  # 2: the models' hidden sizes
    assert read(tmp_path / "a")["spectra.png"] != read(tmp_path / "b")["spectra.png"]


def test_equal_input_gives_equal_bytes_whatever_the_users_style(tmp_path):
    write_report(tmp_path / "here", *example())
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "import test_report; test_report.write_report(Path(sys.argv[2]), *test_report.example())\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    style = tmp_path / "matplotlibrc"
    style.write_text("font.size: 20\naxes.facecolor: red\nsavefig.dpi: 30\n")
    root = Path(sys.modules["pkt.report"].__file__).parents[2]
    given = {"MATPLOTLIBRC": str(style), "PYTHONPATH": str(root), "TZ": "Asia/Tokyo"}
    arguments = [str(Path(__file__).parent), str(tmp_path / "there")]
    subprocess.run(
        [sys.executable, "-c", script, *arguments], check=True, env=dict(os.environ) | given
    )
    assert read(tmp_path / "here") == read(tmp_path / "there")


def test_nothing_of_the_host_is_told(tmp_path):
    for content in read(write_report(tmp_path, *example()).parent).values():
        assert str(tmp_path).encode() not in content
        assert b"matplotlib" not in content.lower()
        assert not re.search(rb"tIME|tEXt|Creation", content)


@pytest.mark.parametrize(
    ("teacher_layers", "kept"), [(3, (0, 1, 2)), (126, tuple(range(0, 126, 2))), (1, (0,))]
)
def test_any_number_of_layers_is_drawn_without_clipping(teacher_layers, kept):
    manifest, heat, spectra = example(teacher_layers=teacher_layers, kept=kept)
    one_layer = {key: value for key, value in heat.items() if ".0." in key}
    drawn = pictures.draw(manifest, one_layer, spectra, {})
    for picture in drawn.values():
        image = imread(io.BytesIO(picture))[..., :3]
        frame = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (frame == 1).all()


@pytest.mark.parametrize("fill", [0.0, 1.0, np.nan])
def test_flat_and_empty_scores_are_drawn(fill):
    manifest, heat, spectra = example(fill=fill)
    assert pictures.draw(manifest, heat, {key: [0.0, 0.0] for key in spectra}, {})


def test_what_is_not_given_is_left_out(tmp_path):
    manifest, heat, _ = example(embeddings=False)
    files = read(write_report(tmp_path, manifest | {"loss": None}, {}, {}).parent)
    assert set(files) == {"index.html", "layer_scores.png"}
    only = {key: value for key, value in heat.items() if ".1." in key}
    assert set(pictures.draw(manifest, only, {}, {})) == {
        "layer_scores.png",
        "sensitivity_layer_01.png",
    }


def test_layers_beyond_a_hundred_sort_by_name():
    manifest, heat, _ = example(teacher_layers=126, kept=tuple(range(120)), embeddings=False)
    some = {key: heat[key] for key in heat if ".7." in key or ".119." in key}
    names = list(pictures.draw(manifest, some, {}, {}))[1:]
    assert names == ["sensitivity_layer_007.png", "sensitivity_layer_119.png"]


def window_colour(image):
    """Pixels of the outline's colour."""
    return (np.abs(image[..., :3] - np.array([0xD9, 0x48, 0x0F]) / 255) < 0.02).all(-1)


def test_the_outline_stands_where_the_window_is():
    manifest, heat, _ = example(kept=(4,), embeddings=False)
    key = "model.layers.0.mlp.down_proj"
    manifest["windows"] = {key: manifest["windows"][key] | {"rows": [16, 48], "cols": [43, 129]}}
    image = imread(io.BytesIO(pictures.draw(manifest, heat, {}, {})["sensitivity_layer_00.png"]))
    ys, xs = np.nonzero(window_colour(image))
    left, top, side = 80, 144, 256  # of the first panel, in pixels
    assert np.allclose([xs.min(), xs.max()], [left + side / 4, left + side * 3 / 4], atol=3)
    assert np.allclose([ys.min(), ys.max()], [top + side / 4, top + side * 3 / 4], atol=3)


def test_single_weights_have_no_outline():
    manifest, heat, _ = example("top-weights", embeddings=False)
    drawn = pictures.draw(manifest, heat, {}, {})
    for name in (name for name in drawn if name.startswith("sensitivity")):
        assert not window_colour(imread(io.BytesIO(drawn[name]))).any()


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1000])
def test_margins_show_the_chosen_share_of_each_bin(size):
    rng = np.random.default_rng(size)
    chosen = sorted(rng.choice(size, max(1, size // 3), replace=False).tolist())
    share = pictures._share(chosen, size)
    expected = [
        np.mean([i in set(chosen) for i in range(size) if i * len(share) // size == bin_])
        for bin_ in range(len(share))
    ]
    assert len(share) == min(64, size)
    assert np.allclose(share, expected)


def test_a_score_that_is_a_bound_says_so(tmp_path):
    for select, said in (("rows-cols", False), ("consistent", True)):
        page = write_report(tmp_path / select, *example(select)).read_text(encoding="utf-8")
        assert ("at most: the smaller of the sums" in page) == said


def test_only_rows_and_columns_of_layers_are_lists():
    assert pictures.is_listed("model.layers.0.mlp.up_proj", "rows-cols")
    assert not pictures.is_listed("model.layers.0.mlp.up_proj", "window")
    for axis in ("rows", "cols"):
        assert pictures.is_listed("model.layers.0.mlp.up_proj", "consistent", axis)
        assert not pictures.is_listed("model.embed_tokens", "rows-cols", axis)
    assert pictures.is_listed("model.embed_tokens", "consistent", "cols")
    assert not pictures.is_listed("model.embed_tokens", "consistent", "rows")


def test_bins_may_be_lists():
    manifest, heat, spectra = example(embeddings=False)
    lists = {key: replace(value, bins=value.bins.tolist()) for key, value in heat.items()}
    assert pictures.draw(manifest, heat, spectra, {}) == pictures.draw(manifest, lists, spectra, {})


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="the report cannot be written"):
        write_report(blocked, *example())
