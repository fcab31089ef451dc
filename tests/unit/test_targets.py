"""Targets on the disk: which logits are kept, in which files, and what becomes of damaged ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pkt import targets
from pkt.errors import CheckpointError
from pkt.records import TopLogits


def dense(logits: torch.Tensor, k: int, vocabulary: int) -> TopLogits:
    """A whole stable sort of the row, in float64."""
    values, ids = logits[:, :vocabulary].double().sort(dim=-1, descending=True, stable=True)
    total = logits[:, :vocabulary].double().exp().sum(-1).log()
    return TopLogits(values[:, :k].float(), ids[:, :k].int(), total)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 12), st.data())
def test_the_largest_logits_are_those_of_a_stable_sort(
    seed: int, rows: int, vocabulary: int, data: st.DataObject
) -> None:
    """Ties go to the lower id, zeros of either sign are equal, padding is not seen."""
    k = data.draw(st.integers(1, vocabulary))
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (rows, vocabulary + 3), generator=draw).float()
    logits[logits == 0] *= torch.where(torch.rand((), generator=draw) < 0.5, -1.0, 1.0)
    found, wanted = targets.top_logits(logits, k, vocabulary), dense(logits, k, vocabulary)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.allclose(found.logsumexp, wanted.logsumexp, rtol=1e-12)
    assert (found.logits.dtype, found.ids.dtype, found.logsumexp.dtype) == (
        torch.float32, torch.int32, torch.float64,
    )  # fmt: skip


def test_blocks_change_nothing() -> None:
    logits = 5 * torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    whole = targets.top_logits(logits, 9, 50)
    with mock.patch.object(targets, "BLOCK_ELEMENTS", 100):
        parts = targets.top_logits(logits, 9, 50)
    assert all(map(torch.equal, *(vars_of(top) for top in (whole, parts))))


def vars_of(top: TopLogits) -> tuple[torch.Tensor, ...]:
    return top.logits, top.ids, top.logsumexp


def test_the_tail_is_what_is_left_of_one() -> None:
    logits = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    top = targets.top_logits(logits, 10, 40)
    wanted = logits.double().softmax(-1).sort(-1, descending=True).values[:, 10:].sum(-1)
    assert torch.allclose(targets.tail(top), wanted, rtol=1e-9)
    everything = targets.tail(targets.top_logits(logits, 40, 40))
    assert float(everything.min()) >= 0
    assert float(everything.max()) < 1e-14


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 200))
def test_shards_hold_every_example_once_and_whole(answers: list[int], size: int) -> None:
    with mock.patch.object(targets, "SHARD_BYTES", size):
        shards = targets.layout(answers, 1)
    examples = [n for s in shards for n in range(s.first, s.first + s.examples)]
    assert examples == list(range(len(answers)))
    for shard in shards:
        counts = answers[shard.first : shard.first + shard.examples]
        assert shard.rows == sum(counts)
        assert (shard.rows - counts[-1]) * targets.row_bytes(1) < size
    assert all(s.rows * targets.row_bytes(1) >= size for s in shards[:-1])
    assert len({shard.file for shard in shards}) == len(shards)


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """Two files of targets, of examples with 2, 3 and 1 answer tokens, 4 logits each."""
    answers = [2, 3, 1]
    with mock.patch.object(targets, "SHARD_BYTES", 3 * targets.row_bytes(4)):
        shards, digests = targets.layout(answers, 4), []
        for number, shard in enumerate(shards):
            draw = torch.Generator().manual_seed(number)
            rows = targets.top_logits(torch.randn(shard.rows, 8, generator=draw), 4, 8)
            data = targets.pack([rows])
            (tmp_path / shard.file).write_bytes(data)
            digests.append(hashlib.sha256(data).hexdigest())
        assert len(shards) == 2
        text = targets.index_text(list(zip(shards, digests, strict=True)), answers, 4)
        (tmp_path / targets.INDEX).write_text(text)
        yield tmp_path


def test_rows_are_read_back_by_example(written: Path) -> None:
    held = targets.Targets(written)
    assert [len(held.of(number).logsumexp) for number in range(3)] == [2, 3, 1]
    draw = torch.Generator().manual_seed(0)
    first = targets.top_logits(torch.randn(5, 8, generator=draw), 4, 8)
    assert torch.equal(torch.cat([held.of(0).ids, held.of(1).ids]), first.ids)
    assert torch.equal(torch.cat([held.of(0).logits, held.of(1).logits]), first.logits)


@pytest.mark.parametrize("damage", ["index", "shard", "cut", "gone", "other index"])
def test_damaged_files_are_named(damage: str, written: Path) -> None:
    path = written / ("logits-00002-of-00002.safetensors")
    if damage == "index":
        path = written / targets.INDEX
        path.write_text("{}")
    elif damage == "other index":
        path = written / targets.INDEX
        path.write_text(path.read_text().replace("[2, 3, 1]", "[2, 3, 2]"))
    elif damage == "shard":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=path.name) as error:
        targets.Targets(written)
    assert "--overwrite" in str(error.value.hint)
