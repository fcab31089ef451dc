"""Reading ahead: every tensor as stored, in every mode, in order, converted where asked."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from pkt.checkpoint import Checkpoint, open_checkpoint
from pkt.errors import CheckpointError
from pkt.stream import PAGE, TORCH_DTYPES, CheckpointSource, arena, turns

CPU = torch.device("cpu")
MODES = ["mmap", "buffered", "direct"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("llama", tmp_path_factory.mktemp("stream"), shards=3)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def source_of(
    checkpoint: Checkpoint, mode: str = "buffered", slots: int = 2, dtype: Any = torch.float32
) -> CheckpointSource:
    return CheckpointSource(checkpoint, mode, slots, dtype, CPU)


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_layers_come_as_stored_in_any_order(mode: str, slots: int, folder: Path) -> None:
    checkpoint, wanted = open_checkpoint(folder, 4), stored(folder)
    source = source_of(checkpoint, mode, slots)
    order = [0, 1, 2, 3, 3, 2, 0]
    jobs = [(f"layer {i}", dict(checkpoint.layers[i])) for i in order]
    seen = 0
    kept = turns(order, slots)
    assert sum(use is not None for use in kept) == min(slots, 2)
    for index, held, tensors in zip(order, kept, source.jobs(jobs), strict=True):
        assert tensors.keys() == checkpoint.layers[index].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, wanted[f"model.layers.{index}.{name}"])
            seen += tensor.nbytes * (held is None)
    assert seen <= source.counts()["bytes"] < seen + len(order) * PAGE
    source.close()
    source.close()  # twice is nothing
    assert source.counts()["bytes"] >= seen, "counts survive the slots"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_layers_reach_a_gpu_as_stored(slots: int, computed: torch.dtype, folder: Path) -> None:
    checkpoint, wanted = open_checkpoint(folder, 4), stored(folder)
    source = CheckpointSource(checkpoint, "buffered", slots, computed, torch.device("cuda"))
    order = [0, 1, 2, 3, 3, 2, 1, 0]
    jobs = [(f"layer {i}", dict(checkpoint.layers[i])) for i in order]
    for _ in range(2):  # the second time slots are locked that were unlocked before
        for index, tensors in zip(order, source.jobs(jobs), strict=True):
            for name, tensor in tensors.items():
                assert tensor.device.type == "cuda"
                expected = wanted[f"model.layers.{index}.{name}"].to(computed)
                assert torch.equal(tensor.cpu(), expected)
    next(iter(source.jobs(jobs)))
    source.close()  # with a layer on its way


@pytest.mark.parametrize(
    ("order", "slots", "kept"),
    [
        ("abccba", 1, [None, None, None, 2, None, None]),
        ("abccba", 2, [None, None, None, 2, 1, None]),
        ("abccba", 9, [None, None, None, 2, 1, 0]),
        ("bccba", 3, [None, None, 1, 0, None]),  # continued in the middle
        ("cba", 2, [None, None, None]),
        ("cddcabba", 2, [None, None, 1, 0, None, None, 5, 4]),  # a turn in every segment
        ("aaa", 2, [None, 0, None]),  # a slot is given up after the second use
        ("", 2, []),
    ],
)
def test_what_a_turn_keeps(order: str, slots: int, kept: list[int | None]) -> None:
    assert turns(order, slots) == kept


def test_every_order_can_be_kept_by_its_slots() -> None:
    """Never more jobs at once than slots, the one being read included."""
    choose = random.Random(1)
    for _ in range(300):
        order = [choose.randrange(3) for _ in range(choose.randrange(12))]
        slots = choose.randrange(1, 5)
        kept = turns(order, slots)
        held: set[int] = set()
        for use, earlier in enumerate(kept):
            if earlier is None:
                assert len(held) < slots, "no slot is free for the next read"
            else:
                held.remove(earlier)
                assert order[earlier] == order[use]
            if use in kept:
                held.add(use)
        assert not held


@pytest.mark.parametrize("mode", MODES)
def test_reads_out_of_turn_and_windows(mode: str, folder: Path) -> None:
    checkpoint, wanted = open_checkpoint(folder, 4), stored(folder)
    source = source_of(checkpoint, mode)
    tensors = source.read({"a": checkpoint.outer["lm_head.weight"],
                           "b": checkpoint.outer["model.norm.weight"]})  # fmt: skip
    assert torch.equal(tensors["a"], wanted["lm_head.weight"])
    assert torch.equal(tensors["b"], wanted["model.norm.weight"])
    piece = checkpoint.layers[2]["mlp.up_proj.weight"]
    whole = wanted["model.layers.2.mlp.up_proj.weight"]
    rows, columns = whole.shape
    for r, c in [
        ((0, rows), (0, columns)),
        ((3, 4), (5, 6)),
        ((7, 33), (11, 48)),
        ((79, 80), (0, 48)),
    ]:
        before = source.counts()["bytes_out_of_turn"]
        window = source.window(piece, range(*r), range(*c))
        assert torch.equal(window, whole[slice(*r), slice(*c)])
        if mode == "mmap":
            assert source.counts()["bytes_out_of_turn"] - before == window.nbytes
    part = piece.rows(10, 20)
    assert torch.equal(source.read({"p": part})["p"], whole[10:20])
    source.close()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16])
def test_other_types_are_converted_value_by_value(
    dtype: str, computed: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 becomes bfloat16 in place, where both have the same size; windows stay as stored."""
    monkeypatch.setattr("pkt.stream.TURNED", 7)  # weights at once
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(12, 10, generator=draw).to(TORCH_DTYPES[dtype])
    names = [f"model.layers.{i}.{n}.weight" for i in range(2) for n in ("a", "b")]
    save_file({name: values.clone() for name in names}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, 2)
    assert checkpoint.dtypes() == [dtype]
    source = source_of(checkpoint, dtype=computed)
    jobs = [("layer", dict(layer)) for layer in checkpoint.layers]
    for tensors in source.jobs(jobs):
        for tensor in tensors.values():
            assert tensor.dtype == computed
            assert torch.equal(tensor, values.to(computed))
    window = source.window(checkpoint.layers[0]["a.weight"], range(2, 5), range(10))
    assert window.dtype == TORCH_DTYPES[dtype]
    assert torch.equal(window.float(), values[2:5].float())
    source.close()


def test_an_arena_begins_on_a_page() -> None:
    for size in (1, PAGE - 1, PAGE, 100_000):
        memory = arena(size)
        assert (memory.data_ptr() % PAGE, memory.numel(), memory.dtype) == (0, size, torch.uint8)


def test_a_closed_source_leaves_its_jobs(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, 4)
    source = source_of(checkpoint)
    jobs = iter(source.jobs([(f"{i}", dict(checkpoint.layers[i])) for i in range(4)]))
    next(jobs)
    source.close()
    with pytest.raises(StopIteration):
        next(jobs)


def test_a_shard_that_shrank_after_it_was_opened(tmp_path: Path) -> None:
    import os

    folder = tiny.build("llama", tmp_path)
    checkpoint = open_checkpoint(folder, 4)
    source = source_of(checkpoint)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    jobs = [(f"{i}", dict(checkpoint.layers[i])) for i in range(4)]
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        list(source.jobs(jobs))
    source.close()
