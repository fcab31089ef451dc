"""The plan of one pass forward: what it holds, and the smallest setting that it names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from pkt.config import MIB
from pkt.disk import choose_io
from pkt.models import Model, open_model
from pkt.plan import Attributed, Mapped, make_forward_plan, make_targets_plan
from pkt.records import Plan, Room


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("plan") / "teacher"
    wide = {"hidden": 768, "intermediate": 2048, "heads": 8, "kv_heads": 4, "layers": 3}
    return open_model(str(tiny.build("llama", folder, "teacher", vocab=512, **wide)), {}, "teacher")


def planned(teacher: Model, budget: int = 1 << 40, **options: Any) -> Plan:
    settings: dict[str, Any] = {"dtype": "F32", "tokens": 5000, "rows": 200, "shapes": 9}
    settings |= {"answers": 2000, "results": 10**6, "held": 10**5}
    return make_forward_plan(teacher, budget=(budget, "--max-ram"), **{**settings, **options})


def test_read_ahead_before_one_slot_before_a_refusal(teacher: Model) -> None:
    ahead = planned(teacher)
    assert (ahead.slots, ahead.fits, ahead.passes) == (2, True, 1)
    small = planned(teacher, ahead.peak_bytes - 1)
    assert (small.slots, small.fits) == (1, True)
    least = planned(teacher, ahead.smallest_bytes)
    assert least.fits
    over = planned(teacher, small.peak_bytes - 1)
    assert not over.fits
    assert over.smallest_bytes == ahead.smallest_bytes
    assert 0 <= ahead.smallest_bytes - small.peak_bytes < MIB


def test_examples_cost_disk_and_only_the_longest_costs_memory(teacher: Model) -> None:
    base, more = planned(teacher), planned(teacher, tokens=10**7, answers=10**6, results=10**9)
    assert more.peak_bytes == base.peak_bytes
    assert more.read_bytes == base.read_bytes == teacher.checkpoint.bytes - 768 * 4  # less a norm
    assert more.spool_bytes == 2 * 10**7 * 768 * 4
    assert more.record_bytes == 10**9
    assert planned(teacher, rows=20_000).peak_bytes > base.peak_bytes
    assert planned(teacher, held=10**9).peak_bytes > base.peak_bytes + 2 * 10**9


def test_bfloat16_products_of_each_length_are_counted_as_far_as_they_are_kept(
    teacher: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pkt.plan.sizes.multiplies_bfloat16", lambda: True)
    assert planned(teacher, shapes=500).peak_bytes == planned(teacher).peak_bytes  # of float32
    few, many, more = (planned(teacher, dtype="BF16", shapes=n) for n in (9, 1000, 2000))
    assert few.peak_bytes < many.peak_bytes == more.peak_bytes
    assert many.peak_bytes - few.peak_bytes == (1024 - 9 * 6) * (640 << 10)


def test_the_disks_are_those_of_spool_and_targets(teacher: Model) -> None:
    room = Room("out", 10**9, "elsewhere", 10**9, shared=False)
    plan = planned(teacher, room=room)
    spool, results = plan.disks
    assert (spool.folder, spool.bytes) == ("elsewhere", plan.spool_bytes)
    assert (results.folder, results.bytes) == ("out/.work", 10**6)


def test_a_single_pass_finds_nothing_in_the_page_cache_again(teacher: Model) -> None:
    reading = choose_io(teacher.checkpoint, planned(teacher), 1 << 40)
    assert reading.mode == "buffered"
    assert "second pass" not in reading.reason


def test_the_folder_of_the_records_is_named(teacher: Model) -> None:
    shared = planned(teacher, room=Room(str(Path("out")), 10**9, None, 10**9, shared=True))
    (only,) = shared.disks
    assert only.bytes == shared.spool_bytes + 10**6


# States


def with_states(teacher: Model, budget: int = 1 << 40, **options: Any) -> Plan:
    settings: dict[str, Any] = {"dtype": "F32", "tokens": 5000, "rows": 200, "shapes": 9}
    settings |= {"answers": 2000, "results": 10**6, "held": 10**5}
    return make_targets_plan(teacher, budget=(budget, "--max-ram"), **{**settings, **options})


def test_logits_alone_are_planned_as_before(teacher: Model) -> None:
    plain, made = planned(teacher), with_states(teacher)
    assert made.device_bytes > 0
    assert replace(made, device_parts=()) == plain


def test_map_rows_and_attribution_are_counted(teacher: Model) -> None:
    base = with_states(teacher)
    mapped = Mapped(teacher, rows=2000, kept=2, readings=0, chunk_elements=1 << 22, places=0)
    states = with_states(teacher, mapped=mapped)
    assert states.peak_bytes - base.peak_bytes == 4 * 768 * 768
    assert states.spool_bytes - base.spool_bytes == 2 * 2000 * 768 * 4
    assert states.passes == 1
    compared = with_states(teacher, mapped=replace(mapped, places=200))
    assert compared.peak_bytes > states.peak_bytes
    made = with_states(teacher, mapped=replace(mapped, readings=2))
    assert made.read_bytes > states.read_bytes
    known = with_states(teacher, attributed=Attributed(50_000, 2000))
    assert known.passes == 3
    assert known.read_bytes > 2.5 * base.read_bytes
    assert known.spool_bytes > 4 * 50_000 * 768 * 4  # three layers' inputs, outputs, gradients
    assert known.peak_bytes > base.peak_bytes
    assert known.smallest_bytes <= known.peak_bytes
    small = with_states(teacher, known.smallest_bytes, attributed=Attributed(50_000, 2000))
    assert (small.slots, small.fits) == (1, True)


def test_fewer_boundaries_of_attribution_are_kept_where_the_disk_is_small(teacher: Model) -> None:
    wanted = Attributed(50_000, 200)
    every = with_states(teacher, attributed=wanted)
    room = Room("out", 1 << 40, None, every.spool_bytes - 1, shared=True)
    less = with_states(teacher, attributed=wanted, room=room)
    assert every.spool_every == 1 < less.spool_every
    assert less.spool_bytes < every.spool_bytes


def test_without_logits_the_head_is_not_read(teacher: Model) -> None:
    head = teacher.head
    assert head
    assert with_states(teacher).read_bytes - with_states(teacher, logits=False).read_bytes == (
        head.bytes
    )
