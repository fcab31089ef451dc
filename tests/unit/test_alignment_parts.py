"""What the quality report stands on: kept maps, likeness of layers, the lens over chunks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from pkt.api import prepare_quality
from pkt.errors import OutputError
from pkt.methods.semalign.heads import open_heads, pair_maps
from pkt.semantics import load_map, save_map
from pkt.similarity import lens_quality, linear_cka

INPUTS = {"teacher": "a", "student": "b", "seed": 0}


def saved(folder: Path) -> tuple[Path, torch.Tensor]:
    made = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = folder / "maps" / "dual.safetensors"
    save_map(path, made, INPUTS, {"condition": 7.0})
    return path, made


def test_a_map_comes_back_with_what_was_found(tmp_path: Path) -> None:
    path, made = saved(tmp_path)
    held = load_map(path, INPUTS)
    assert held is not None
    assert torch.equal(held[0], made.float())
    assert held[1] == {"condition": 7.0}
    assert [p.name for p in path.parent.iterdir()] == ["dual.safetensors"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"teacher": "c"}, {"more": 1}])
def test_a_map_of_other_inputs_is_none(change: dict[str, Any], tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    assert load_map(path, INPUTS | change) is None


def test_a_map_that_is_damaged_anywhere_is_none(tmp_path: Path) -> None:
    path, made = saved(tmp_path)
    data = path.read_bytes()
    noticed = 0
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 64
        path.write_bytes(broken)
        held = load_map(path, INPUTS)
        noticed += held is None
        # What is left is a header that means the same, such as its padding.
        assert held is None or (torch.equal(held[0], made.float()) and held[1])
    assert noticed > len(data) * 0.9
    for end in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        assert load_map(path, INPUTS) is None
    assert load_map(tmp_path / "nothing", INPUTS) is None


def test_a_map_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "maps").write_text("a file")
    with pytest.raises(OutputError, match="the map cannot be written"):
        save_map(tmp_path / "maps" / "dual.safetensors", torch.ones(1, 1), {}, {})


def test_maps_are_used_again_until_a_head_changes(tmp_path: Path) -> None:
    models = {}
    for seed, size in enumerate(("teacher", "student")):
        models[size] = tiny.build("llama", tmp_path / size, size, vocab=160, seed=seed)
        tiny.write_tokenizer(tmp_path / size, 128)

    def made(**options: Any) -> Any:
        task = prepare_quality(str(models["teacher"]), str(models["student"]))
        opened = partial(open_heads, task.teacher, task.student, task.shared)
        return pair_maps(("cosine", "dual", "random"), opened(**options), opened, tmp_path / "maps")

    first, second = made(), made()
    assert first.reused == ()
    assert second.reused == ("cosine", "dual")
    assert all(torch.equal(first.maps[name], second.maps[name]) for name in first.maps)
    assert (first.heads, first.self_cosine) == (second.heads, second.self_cosine)
    path = tmp_path / "maps" / "dual.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert made().reused == ("cosine",), "a damaged one is made anew"
    assert path.read_bytes() == whole
    assert made(fold_norm=False).reused == ()
    assert made().reused == (), "each run left its own"
    tiny.build("llama", tmp_path / "student", "student", vocab=160, seed=5)
    assert made().reused == (), "headers alike, other weights"


def test_the_lens_does_not_depend_on_chunks() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(50, 6, generator=draw), torch.randn(50, 4, generator=draw)
    states, mapped = torch.randn(2, 7, 6, generator=draw), torch.randn(2, 7, 4, generator=draw)
    whole = lens_quality([(teacher, student)], states, {"m": mapped})["m"]
    parts = zip(teacher.split(3), student.split(3), strict=True)
    split = lens_quality(parts, states, {"m": mapped})["m"]
    assert split.cosine == pytest.approx(whole.cosine, abs=1e-6)
    assert split.top1 == whole.top1


def test_states_that_are_not_mapped_keep_everything() -> None:
    draw = torch.Generator().manual_seed(1)
    head, states = torch.randn(40, 6, generator=draw), torch.randn(1, 9, 6, generator=draw)
    found = lens_quality([(head, head)], states, {"same": 3 * states, "turned": -states})
    assert found["same"].cosine == pytest.approx((1.0,), abs=1e-6)
    assert found["same"].top1 == (1.0,)
    assert found["turned"].cosine == pytest.approx((-1.0,), abs=1e-6)
    assert found["turned"].top1 == (0.0,)


def test_likeness_knows_no_rotation_and_no_scale() -> None:
    draw = torch.Generator().manual_seed(2)
    x, other = torch.randn(2, 60, 8, generator=draw)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=draw))[0]
    (row,) = linear_cka([x], [x, 3 * x @ turn + 5, other])
    assert row[:2] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert abs(row[2]) < 0.2


def test_likeness_of_unrelated_states_is_nought_though_channels_outnumber_them() -> None:
    draw = torch.Generator().manual_seed(3)
    ((value,),) = linear_cka(
        [torch.randn(40, 900, generator=draw)], [torch.randn(40, 700, generator=draw)]
    )
    assert abs(value) < 0.1, "the plain estimator says 0.95"


def test_states_that_are_all_alike_are_like_nothing() -> None:
    ((value,),) = linear_cka([torch.ones(9, 3)], [torch.randn(9, 3)])
    assert abs(value) <= 1
