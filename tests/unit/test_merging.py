"""A model written anew is W + Δ rounded once, and otherwise the source, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pkt.merging.blocks
from pkt.checkpoint import Checkpoint, open_checkpoint
from pkt.errors import CheckpointError, IncompatibleError
from pkt.merging import (
    Change,
    compare_model,
    copy_rest,
    lay_out,
    new_config,
    write_model,
)

torch.set_num_threads(1)
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"


def store(folder: Path, dtype: torch.dtype = torch.bfloat16, shards: bool = True) -> Checkpoint:
    """Two layers and their ends, with integers and a scalar among them, in one file or two."""
    draw = torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    files: dict[str, dict[str, torch.Tensor]] = {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": tensor(50, 7), Q: tensor(33, 7),
            "model.layers.0.norm.weight": tensor(7),
        },
        "model-00002-of-00002.safetensors": {
            K: tensor(33, 7), "model.layers.1.norm.weight": tensor(7),
            "model.layers.1.mask": torch.arange(5), "model.scale": tensor(),
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if shards:
        for name, held in files.items():
            save_file(held, folder / name, metadata={"format": "pt"})
        weight_map = {tensor: name for name, held in files.items() for tensor in held}
        index = {"metadata": {"total_size": 1, "total_parameters": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        whole = {name: tensor for held in files.values() for name, tensor in held.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder, 2)


def change(rows: int = 33, columns: int = 7, scale: float = 0.1) -> Change:
    draw = torch.Generator().manual_seed(4)
    b = torch.randn(rows, 2, generator=draw) * scale
    return Change(b, torch.randn(2, columns, generator=draw))


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for p in sorted(folder.glob("*.safetensors")) for n, t in load_file(p).items()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor takes several blocks, the last of them a short one."""
    monkeypatch.setattr(pkt.merging.blocks, "BLOCK_BYTES", 200)


@pytest.mark.parametrize("shards", [True, False])
def test_without_a_change_every_file_is_the_same(tmp_path: Path, shards: bool) -> None:
    source = store(tmp_path / "s", shards=shards)
    (tmp_path / "o").mkdir()
    layout = lay_out(source, {})
    assert write_model(source, layout, tmp_path / "o") == {}
    for path in (tmp_path / "s").glob("*.safetensors"):
        assert (tmp_path / "o" / path.name).read_bytes() == path.read_bytes()
    assert layout.bytes == source.bytes
    compare_model(source, layout, open_checkpoint(tmp_path / "o", 2))


@pytest.mark.parametrize("kept", [None, "F32", "BF16", "F16"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
     torch.float8_e5m2],
)  # fmt: skip
def test_against_torch_for_every_pair_of_types(
    tmp_path: Path, dtype: torch.dtype, kept: str | None
) -> None:
    source = store(tmp_path / "s", dtype)
    out = tmp_path / "o"
    out.mkdir()
    eight = dtype.itemsize == 1
    if eight and kept is None:
        with pytest.raises(IncompatibleError, match=r"8 bits would swallow"):
            lay_out(source, {Q: change()}, None)
        return
    delta = change()
    layout = lay_out(source, {Q: delta}, kept)
    told: list[tuple[str, int, int]] = []
    errors = write_model(source, layout, out, lambda *step: told.append(step))
    compare_model(source, layout, open_checkpoint(out, 2))
    before, after = read(tmp_path / "s"), read(out)
    names = {None: dtype, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        old = before[name]
        if old.dtype == torch.int64:
            assert torch.equal(tensor, old)
            continue
        assert tensor.dtype == names[kept]
        wide = old.double() if dtype == torch.float64 else old.float()
        expected = wide + delta.b @ delta.a if name == Q else wide
        assert torch.equal(tensor, expected.float().to(tensor.dtype) if kept else
                           expected.to(tensor.dtype))  # fmt: skip
    product = (delta.b @ delta.a).double()
    lost = after[Q].double() - before[Q].double() - product
    assert errors == {Q: pytest.approx(float(lost.norm() / product.norm()), rel=1e-9, abs=1e-12)}
    assert [step[1] for step in told] == sorted(step[1] for step in told)
    assert told[-1][1:] == (layout.bytes, layout.bytes)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in after.values())


def test_a_tensor_is_added_to_the_last_file(tmp_path: Path) -> None:
    source = store(tmp_path / "s")
    (tmp_path / "o").mkdir()
    added, head = {"lm_head.weight": "model.embed_tokens.weight"}, change(50)
    layout = lay_out(source, {"lm_head.weight": head}, None, added)
    write_model(source, layout, tmp_path / "o")
    last = load_file(tmp_path / "o/model-00002-of-00002.safetensors")
    embedding = read(tmp_path / "s")["model.embed_tokens.weight"]
    expected = (embedding.float() + head.b @ head.a).bfloat16()
    assert torch.equal(last["lm_head.weight"], expected)
    assert torch.equal(read(tmp_path / "o")["model.embed_tokens.weight"], embedding)
    compare_model(source, layout, open_checkpoint(tmp_path / "o", 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_is_named_and_leaves_no_file(tmp_path: Path, bad: float) -> None:
    source = store(tmp_path / "s")
    (tmp_path / "o").mkdir()
    wrong = change()
    wrong.b[20, 0] = bad
    wrong.a[0, :] = 10.0
    with pytest.raises(CheckpointError, match=rf"{Q}': element 14\d is NaN or infinite in BF16"):
        write_model(source, lay_out(source, {Q: wrong}), tmp_path / "o")
    assert list((tmp_path / "o").iterdir()) == []


def test_a_weight_beyond_float16_is_named(tmp_path: Path) -> None:
    source = store(tmp_path / "s")
    whole = read(tmp_path / "s")
    whole[Q][3, 2] = 1e5
    save_file(
        {name: whole[name] for name in load_file(source.files[0][0])}, source.files[0][0],
        metadata={"format": "pt"},
    )  # fmt: skip
    source = open_checkpoint(tmp_path / "s", 2)
    (tmp_path / "o").mkdir()
    with pytest.raises(CheckpointError, match=rf"{Q}': element 23 is NaN or infinite in F16"):
        write_model(source, lay_out(source, {}, "F16"), tmp_path / "o")


def test_one_wrong_bit_is_found(tmp_path: Path) -> None:
    source = store(tmp_path / "s")
    layout = lay_out(source, {Q: change()})
    (tmp_path / "o").mkdir()
    write_model(source, layout, tmp_path / "o")
    path = tmp_path / "o/model-00001-of-00002.safetensors"
    good = path.read_bytes()
    for at in (-1, -33 * 7 * 2 - 15, -33 * 7 * 2 - 50 * 7 * 2):
        raw = bytearray(good)
        raw[at] ^= 1
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match="what was written is not W"):
            compare_model(source, layout, open_checkpoint(tmp_path / "o", 2))


def test_shapes_and_types_that_cannot_be_changed_are_refused(tmp_path: Path) -> None:
    source = store(tmp_path / "s")
    with pytest.raises(IncompatibleError, match=r"expected shape \(33, 8\), found \(33, 7\)"):
        lay_out(source, {Q: change(33, 8)})
    with pytest.raises(IncompatibleError, match="expected floating-point weights, found I64"):
        lay_out(source, {"model.layers.1.mask": change(1, 5)})


def test_what_belongs_to_a_model_is_copied_and_no_more(tmp_path: Path) -> None:
    source, out = tmp_path / "s", tmp_path / "o"
    store(source)
    out.mkdir()
    kept = ["tokenizer.json", "chat_template.jinja", "tokenizer.model", "generation_config.json",
            "LICENSE", "vocab.txt", "merges.txt", "modeling_own.py"]  # fmt: skip
    left = ["README.md", ".gitattributes", "pytorch_model.bin", "adapter_config.json",
            "adapter_model.safetensors", "consolidated.00.pth", "pkt_manifest.json", "m.gguf",
            "pytorch_model.bin.index.json"]  # fmt: skip
    for name in (*kept, *left):
        (source / name).write_text(name)
    config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(config))
    for folder in ("additional_chat_templates", "onnx"):
        (source / folder).mkdir()
        (source / folder / "one.jinja").write_text(folder)
    copy_rest(source, out, None)
    assert {path.name for path in out.iterdir()} == {
        *kept, "config.json", "additional_chat_templates",
    }  # fmt: skip
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (out / "additional_chat_templates/one.jinja").is_file()


@pytest.mark.parametrize(
    ("config", "dtype", "untied", "expected"),
    [
        ({"dtype": "bfloat16"}, None, False, None),
        ({"dtype": "float32"}, "F32", False, None),
        ({"dtype": "bfloat16"}, "F32", False, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, "F16", False, {"torch_dtype": "float16"}),
        ({}, "BF16", False, {"dtype": "bfloat16"}),
        ({"a": 1}, None, True, {"a": 1, "tie_word_embeddings": False}),
    ],
)
def test_the_configuration_says_what_has_changed(
    config: dict[str, Any], dtype: str | None, untied: bool, expected: dict[str, Any] | None
) -> None:
    assert new_config(config, dtype, untied) == expected
