"""What a model folder may hold, and how each kind of damage is named: file, tensor, both sides."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from pkt.checkpoint import Checkpoint, Piece, find_outer, first_of, open_checkpoint
from pkt.errors import CheckpointError, IncompatibleError
from pkt.models import open_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tiny.build("llama", tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.build("llama", tmp_path / "model", shards=3)


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    return dict(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the header of a safetensors file, its data as they are."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


def with_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def refused(folder: Path) -> str:
    """What opening the model says; opening it may read no weight, so this covers `extract`."""
    with pytest.raises(CheckpointError) as caught:
        open_model(str(folder), {})
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_layers_and_the_rest_are_told_apart(whole: Path) -> None:
    found = open_checkpoint(whole, 4)
    stored = load_file(whole / "model.safetensors")
    assert found.layer_path == "model.layers"
    assert len(found.layers) == 4
    assert sorted(found.outer) == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    assert found.bytes == sum(t.nbytes for t in stored.values())
    assert found.layer_bytes == max(sum(p.bytes for p in layer.values()) for layer in found.layers)
    raw = (whole / "model.safetensors").read_bytes()
    for index, layer in enumerate(found.layers):
        for suffix, piece in layer.items():
            tensor = stored[f"model.layers.{index}.{suffix}"]
            assert piece.shape == tuple(tensor.shape)
            assert (piece.elements, piece.bytes) == (tensor.numel(), tensor.nbytes)
            data = torch.frombuffer(bytearray(raw[piece.begin : piece.end]), dtype=tensor.dtype)
            assert torch.equal(data.view(tensor.shape), tensor)
    assert found.dtypes() == ["F32"]


def test_rows_of_a_piece() -> None:
    piece = Piece("w", 0, "F32", (5, 3), 100, 160)
    assert piece.rows(1, 3) == Piece("w", 0, "F32", (2, 3), 112, 136)


def test_shards_hold_the_same_tensors(whole: Path, tmp_path: Path) -> None:
    tiny.build("llama", tmp_path / "sharded", shards=3)
    one, several = open_checkpoint(whole, 4), open_checkpoint(tmp_path / "sharded", 4)
    assert len(several.files) > 1

    def shapes(found: Checkpoint) -> list[dict[str, tuple[int, ...]]]:
        return [{n: p.shape for n, p in layer.items()} for layer in found.layers]

    assert shapes(one) == shapes(several)
    assert one.bytes == several.bytes
    assert one.sha256 != several.sha256
    for piece in several.outer.values():
        name = tiny.stored_names(tmp_path / "sharded")[piece.name]
        assert several.shard_name(piece) == name


def test_the_number_of_layers_must_be_that_of_the_configuration(whole: Path) -> None:
    with pytest.raises(
        IncompatibleError, match=r"one run of 5 decoder layers.*model\.layers\.\* × 4"
    ):
        open_checkpoint(whole, 5)


def test_a_layer_between_two_others_is_missing(whole: Path) -> None:
    path = whole / "model.safetensors"
    tensors = {n.replace("layers.2.", "layers.9."): t for n, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"layer model\.layers\.2 has no tensor"):
        open_checkpoint(whole, 4)


@pytest.mark.parametrize("ending", ["bin", "pt", "pth"])
def test_pickle_is_refused_with_the_way_out(ending: str, whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / f"pytorch_model.{ending}")
    text = refused(whole)
    assert "pickle" in text
    assert "safetensors" in text


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 2})
    )
    assert "model.safetensors" in refused(tmp_path)


def test_a_truncated_file(whole: Path) -> None:
    path = whole / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    text = refused(whole)
    assert str(path) in text
    assert "expected" in text
    assert "found" in text


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_less_than_a_header(size: int, whole: Path) -> None:
    os.truncate(whole / "model.safetensors", size)
    assert "model.safetensors" in refused(whole)


def test_bytes_behind_the_tensors(whole: Path) -> None:
    with (whole / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "model.safetensors" in refused(whole)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shape", [48, 49]),
        ("shape", [-1, 48]),
        ("shape", [2**40, 2**40]),
        ("dtype", "BF16"),
        ("dtype", "F99"),
        ("data_offsets", [0, 5]),
        ("data_offsets", [2**60, 2**60 + 9216]),
    ],
)
def test_a_tensor_that_contradicts_itself(key: str, value: Any, whole: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    with_header(whole / "model.safetensors", lambda header: header[name].update({key: value}))
    text = refused(whole)
    assert "model.safetensors" in text
    assert key == "data_offsets" or name in text


def test_tensors_that_overlap(whole: Path) -> None:
    names = [f"model.layers.0.mlp.{kind}_proj.weight" for kind in ("gate", "up")]

    def overlap(header: dict[str, Any]) -> None:
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]

    with_header(whole / "model.safetensors", overlap)
    assert any(name in refused(whole) for name in names)


def test_a_header_that_is_no_json(whole: Path) -> None:
    path = whole / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:12] = b"!!!!"
    path.write_bytes(raw)
    assert str(path) in refused(whole)


def test_an_index_entry_without_its_tensor(sharded: Path) -> None:
    first = sorted(tiny.stored_names(sharded).values())[0]
    with_index(sharded, lambda entries: entries.update({"model.layers.0.ghost.weight": first}))
    text = refused(sharded)
    assert "model.layers.0.ghost.weight" in text
    assert first in text


def test_an_index_entry_whose_shard_is_gone(sharded: Path) -> None:
    gone = sorted(set(tiny.stored_names(sharded).values()))[-1]
    (sharded / gone).unlink()
    assert gone in refused(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size // 2)
    assert path.name in refused(sharded)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.safetensors", "a/../../b.safetensors"])
def test_a_shard_name_that_leaves_the_folder(name: str, sharded: Path) -> None:
    with_index(sharded, lambda entries: entries.update({"model.norm.weight": name}))
    assert Path(name).name in refused(sharded)


def test_a_shard_that_is_a_link_to_elsewhere(sharded: Path, tmp_path: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[0]
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    assert path.name in refused(sharded)


def test_tensors_that_the_index_does_not_list_are_reported(sharded: Path) -> None:
    with_index(sharded, lambda entries: entries.pop("model.norm.weight"))
    assert open_checkpoint(sharded, 4).unindexed == ("model.norm.weight",)


def test_names_of_parameters_outside_the_layers(whole: Path) -> None:
    found = open_checkpoint(whole, 4)

    def named(*names: str) -> Checkpoint:
        outer = {name: Piece(name, 0, "F32", (1,), 0, 4) for name in names}
        return Checkpoint(whole, found.files, "", found.layers, outer, (), 0, "")

    cases = [
        ("model.norm.weight", ["model.norm.weight", "norm.weight"], "model.norm.weight"),
        ("model.norm.weight", ["norm.weight"], "norm.weight"),
        ("norm.weight", ["model.norm.weight"], "model.norm.weight"),
        ("lm_head.weight", ["embed_out.weight"], "embed_out.weight"),
        ("gpt_neox.embed_in.weight", ["embed_in.weight", "embed_out.weight"], "embed_in.weight"),
        ("model.norm.weight", ["lm_head.weight"], None),
    ]
    for name, stored, wanted in cases:
        piece = find_outer(named(*stored), name, "model")
        assert (piece.name if piece else None) == wanted
    assert first_of(["x.lm_head.weight"], ("lm_head.weight",)) == "x.lm_head.weight"
    assert first_of(["xlm_head.weight"], ("lm_head.weight",)) is None
