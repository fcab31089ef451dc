"""Which logical projections a layer has, where their rows lie, and what pairs with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import reference
import tiny
from pkt.errors import IncompatibleError, UsageError
from pkt.models import Model, open_model
from pkt.projections import match, physical_rows, projections_of
from pkt.records import Projection

ROLES = {"q", "k", "v", "o", "gate", "up", "down"}


def opened(folder: Path, family: str, size: str = "teacher", **options: Any) -> Model:
    return open_model(str(tiny.build(family, folder, size, **options)), {})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_the_known_roles(family: str, tmp_path: Path) -> None:
    found = projections_of(opened(tmp_path, family))
    roles = [projection.role for projection in found.values()]
    assert sorted(roles) == sorted(ROLES - {"gate"} if "neox" in family else ROLES)
    config = AutoConfig.from_pretrained(tmp_path)
    heads, kv_heads, head_dim = reference.head_counts(config)
    rows = {p.role: p.out_features for p in found.values()}
    assert rows["q"] == heads * head_dim
    assert rows["k"] == rows["v"] == kv_heads * head_dim
    assert rows["o"] == rows["down"] == 48
    assert rows["up"] == 80


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_rows_of_parts_equal_those_of_the_reference(family: str, tmp_path: Path) -> None:
    """Every logical row is told apart by its number in the stored matrix."""
    model = opened(tmp_path, family)
    config = AutoConfig.from_pretrained(tmp_path)
    seen: dict[str, list[int]] = {}
    for projection in projections_of(model).values():
        shape = model.checkpoint.layers[0][f"{projection.module}.weight"].shape
        stored = torch.arange(shape[0])[:, None].expand(shape)
        parts = reference.split_fused(config.model_type, config, projection.module, stored)
        name = projection.module
        if projection.part:
            (name,) = [n for n in parts if n.endswith(f".{projection.part}_proj")]
        rows = physical_rows(projection, model.head_dim, 1)
        assert (rows or list(range(shape[0]))) == parts[name][:, 0].tolist()
        seen.setdefault(projection.module, []).extend(parts[name][:, 0].tolist())
    for module, rows_seen in seen.items():
        total = model.checkpoint.layers[0][f"{module}.weight"].shape[0]
        assert sorted(rows_seen) == list(range(total)), "each stored row belongs to one part"


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("repeat", [2, 3])
def test_repeated_heads_equal_the_reference(family: str, repeat: int, tmp_path: Path) -> None:
    model = opened(tmp_path, family)
    for projection in projections_of(model).values():
        if projection.role in ("k", "v"):
            plain = physical_rows(projection, 8, 1) or list(range(projection.out_features))
            wanted = reference.expand_kv(torch.tensor(plain)[:, None], 8, repeat, share=False)
            assert physical_rows(projection, 8, repeat) == wanted[:, 0].tolist()


def test_a_plain_matrix_needs_no_row_map() -> None:
    assert physical_rows(Projection("q", "q_proj", None, 8, 4), 2, 1) is None


def test_the_table_of_a_pair(tmp_path: Path) -> None:
    big = opened(tmp_path / "t", "llama", heads=8, kv_heads=2, hidden=64)
    small = opened(tmp_path / "s", "llama", "student", heads=4, kv_heads=4, hidden=32)
    pairs, rows, problems = match(big, small, None, embeddings=True)
    assert problems == []
    actions = {row.module: row.action for row in rows}
    assert actions["self_attn.k_proj"] == "window 32×32 of 64×64 (kv heads × 4)"
    assert actions["mlp.up_proj"] == "window 56×32"
    assert actions["embedding"] == "columns 32 of 64"
    assert {pair.key: pair.kv_repeat for pair in pairs if pair.kv_repeat > 1} == {
        "self_attn.k_proj": 4, "self_attn.v_proj": 4,
    }  # fmt: skip
    assert next(p for p in pairs if p.kv_repeat > 1).teacher_rows == 64
    _, rows, _ = match(big, small, ["q", "mlp.up_proj"], embeddings=False)
    wanted = {row.module for row in rows if row.action != "not a target"}
    assert wanted == {"self_attn.q_proj", "mlp.up_proj"}


def test_equal_shapes_are_whole_matrices(tmp_path: Path) -> None:
    model = opened(tmp_path, "llama")
    _, rows, problems = match(model, model, None, embeddings=False)
    assert problems == []
    assert {row.action for row in rows} == {"whole matrix"}


def test_what_forbids_a_pair_is_all_listed(tmp_path: Path) -> None:
    """A student that is deeper, wider, and of another vocabulary."""
    big = opened(tmp_path / "t", "llama")
    small = opened(tmp_path / "s", "llama", layers=5, hidden=60, vocab=97)
    _, rows, problems = match(big, small, None, embeddings=True)
    text = "\n".join(problems)
    assert "layers: the teacher has 4, the student 5" in text
    assert "self_attn.o_proj: teacher shape (48, 48), student shape (60, 60)" in text
    assert "embedding: vocabulary of the teacher 96, of the student 97" in text
    assert not any(row.ok for row in rows if row.module.endswith("o_proj"))
    wide = opened(tmp_path / "w", "llama", hidden=60)
    assert "embedding: teacher width 48, student width 60" in "\n".join(
        match(big, wide, None, embeddings=True)[2]
    )


def test_unknown_targets_and_missing_roles(tmp_path: Path) -> None:
    llama, neox = opened(tmp_path / "l", "llama"), opened(tmp_path / "n", "gpt_neox")
    with pytest.raises(UsageError, match="no module 'gates'"):
        match(llama, llama, ["gates"], embeddings=False)
    _, rows, problems = match(neox, llama, None, embeddings=False)
    assert problems == ["mlp.gate_proj: the teacher's layers have no gate projection"]
    assert [row.module for row in rows if not row.ok] == ["mlp.gate_proj"]
    assert match(llama, neox, None, embeddings=False)[2] == []


def test_layers_of_different_shapes_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.build("llama", tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name][:70].clone()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        IncompatibleError, match=r"layer 2: mlp\.up_proj: expected shape \(80, 48\)"
    ):
        projections_of(open_model(str(folder), {}))
