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
from pkt.errors import CheckpointError, IncompatibleError, PktError
from pkt.records import LayerPair, TopLogits


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


# States


@pytest.mark.parametrize("aligned", [None, ((1,), (), (0,), (0, 2))])
@pytest.mark.parametrize("dtype", list(targets.STORED))
def test_states_are_read_back_by_example_and_layer(
    dtype: str, aligned: tuple[tuple[int, ...], ...] | None, tmp_path: Path
) -> None:
    """In several files a layer, of examples without a row too."""
    answers, pairs = [2, 3, 1, 4], (LayerPair(2, 1), LayerPair(5, 3, 0.25))
    index = targets.StatesIndex("span", "dual", dtype, 6, pairs, aligned)
    rows, files, written = index.rows(answers), [], {}
    draw = torch.Generator().manual_seed(0)
    with mock.patch.object(targets, "SHARD_BYTES", 2 * 6 * targets.STORED[dtype].itemsize):
        for layer in (1, 3):
            states = [torch.randn(n, 6, generator=draw).to(targets.STORED[dtype]) for n in rows]
            written[layer] = states
            for shard in index.layout(answers, layer):
                data = targets.pack_states(states[shard.first : shard.first + shard.examples])
                (tmp_path / shard.file).write_bytes(data)
                files.append((layer, shard, hashlib.sha256(data).hexdigest()))
        assert len(files) >= 4
        text = targets.index_text([], answers, 0, index, files)
        (tmp_path / targets.INDEX).write_text(text)
        held = targets.Targets(tmp_path)
    assert (held.pairs, held.interface, held.map, held.top_k) == (pairs, "span", "dual", 0)
    for number, count in enumerate(answers):
        meant = range(count) if aligned is None else aligned[number]
        assert held.aligned(number).tolist() == list(meant)
        assert held.aligned(number).dtype == torch.int64
        for layer in (1, 3):
            assert torch.equal(held.states(number, layer), written[layer][number])
    with pytest.raises(IncompatibleError, match="no logits"):
        held.of(0)


def test_logits_alone_have_no_pairs(written: Path) -> None:
    held = targets.Targets(written)
    assert (held.pairs, held.interface, held.map) == ((), None, None)
    assert held.aligned(1).tolist() == [0, 1, 2]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from(["BF16", "F16", "F32"]))
def test_the_error_of_storing_is_that_of_the_worst_row(seed: int, dtype: str) -> None:
    states = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
    kept, error = targets.stored_states(states, dtype)
    each = [
        float(((k.double() - s.double()) ** 2).sum() ** 0.5 / (s.double() ** 2).sum() ** 0.5)
        for k, s in zip(kept, states, strict=True)
    ]
    assert error == pytest.approx(max(each), rel=1e-12)
    assert error <= {"BF16": 2**-8, "F16": 2**-11, "F32": 0}[dtype]


def test_what_a_type_cannot_hold_is_refused() -> None:
    with pytest.raises(PktError, match=r"7e\+04 cannot be stored as F16"):
        targets.stored_states(torch.full((1, 2), -7e4), "F16")
    assert targets.stored_states(torch.zeros(1, 2), "BF16")[1] == 0
