"""The forecast's arithmetic: given what each part takes, how long the whole does; what binds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from pkt.bench import Pace, Work, assumed_seeds, forecast
from pkt.bench.forecast import limit_seconds
from pkt.bench.prediction import work_of
from pkt.bench.rehearsal import first_layers, sampled
from pkt.cli.tables import duration
from pkt.models import open_model
from pkt.records import Sample

GB = 10**9
WORK = Work(
    layers=10, layer_bytes=2 * GB, layer_parameters=GB, slots=2, seeds=4, tokens=512,
    loss_tokens=500, head_parameters=10**8, ends_bytes=GB, window_bytes=3 * GB, boundary_bytes=0,
    boundaries_cached=True,
)  # fmt: skip
PACE = Pace(forward=0.5, backward=1.5, head=2.0, ends=0.0, factors=5.0, read=1e9, windows=5e8)


def seconds(work: Work, pace: Pace) -> dict[str, float]:
    return {phase.name: phase.seconds for phase in forecast(work, pace).phases}


def test_bound_by_the_disk() -> None:
    """Ten layers of 2 s of reading each, the last one's arithmetic, and eight of them again."""
    assert seconds(WORK, PACE) == pytest.approx({
        "embedding and head": 1 + 2, "forward": 20 + 0.5, "backward": 16 + 1.5,
        "factors": 6,
    })  # fmt: skip
    found = forecast(WORK, PACE)
    assert found.bound == "disk"
    assert found.seconds == pytest.approx(3 + 20.5 + 17.5 + 6)


def test_bound_by_the_cores() -> None:
    """The first layer must come before the pass begins; in the backward pass it is there."""
    slow = replace(PACE, forward=3.0, backward=9.0)
    assert seconds(WORK, slow)["forward"] == pytest.approx(30 + 2)
    assert seconds(WORK, slow)["backward"] == pytest.approx(90)
    assert forecast(WORK, slow).bound == "arithmetic and scoring"


def test_bound_by_the_factors() -> None:
    assert forecast(WORK, replace(PACE, factors=100.0)).bound == "factors"


def test_in_turn_reading_and_arithmetic_add() -> None:
    turn = replace(WORK, slots=1)
    assert seconds(turn, PACE)["forward"] == pytest.approx(20 + 5)
    assert seconds(turn, PACE)["backward"] == pytest.approx(18 + 15)


def test_layers_that_the_slots_or_the_page_cache_hold_are_not_read_again() -> None:
    assert seconds(replace(WORK, slots=10), PACE)["backward"] == pytest.approx(15)
    assert seconds(replace(WORK, slots=99), PACE)["backward"] == pytest.approx(15)
    cached = replace(WORK, cached_bytes=10 * GB)
    assert seconds(cached, PACE)["backward"] == pytest.approx(15)
    assert cached.read_bytes == WORK.read_bytes - 10 * GB
    assert replace(WORK, slots=99).read_bytes == (20 + 1 + 3) * GB


def test_boundaries_are_written_once_and_read_again_unless_cached() -> None:
    spooled = replace(WORK, boundary_bytes=GB)
    assert seconds(spooled, PACE)["forward"] == pytest.approx(30 + 0.5)
    assert seconds(spooled, PACE)["backward"] == pytest.approx(16 + 1.5)
    large = replace(spooled, boundaries_cached=False)
    assert seconds(large, PACE)["backward"] == pytest.approx(26 + 1.5)


def test_segments_are_run_forward_once_more() -> None:
    """Of 10 layers every 4th: 0–3 and 4–7 again but for 3 and 7, the slots' turn counted."""
    work = replace(WORK, every=4)
    assert work.again == 2 * 3
    # 9 and 8 stay in the slots at the turn; at those of the segments 6 and 2, beside 7 and 3.
    assert (work.again_reads, work.backward_reads) == (6, 2 * 3)
    assert work.read_bytes == WORK.read_bytes + (12 - 8) * work.layer_bytes
    assert work.flop - WORK.flop == 2 * 6 * GB * 512
    found = seconds(work, PACE)
    assert found["forward"] == seconds(WORK, PACE)["forward"]
    assert found["again"] == pytest.approx(12 + 0.5)
    assert found["backward"] == pytest.approx(15)
    assert seconds(work, replace(PACE, backward=0.5))["backward"] == pytest.approx(12 + 0.5)
    assert seconds(replace(work, slots=1), PACE)["again"] == pytest.approx(12 + 3)
    assert "again" not in seconds(WORK, PACE)
    assert "again" not in seconds(replace(WORK, every=10), PACE), "one segment is kept whole"


def test_a_segment_that_the_page_cache_holds_is_read_once() -> None:
    """The layer before each turn is not run again, so it is read for the backward pass."""
    work = replace(WORK, every=4, segment_cached=True)
    assert (work.again_reads, work.backward_reads) == (6, 2)
    assert seconds(work, PACE)["backward"] == pytest.approx(15)
    whole = replace(work, cached_bytes=16 * GB)  # all that is read again
    assert whole.read_bytes == (20 + 1 + 3) * GB
    assert seconds(whole, PACE)["again"] == pytest.approx(3)
    assert replace(whole, cached_bytes=99 * GB).read_bytes == whole.read_bytes


def test_boundaries_of_segments_are_written_again() -> None:
    work = replace(WORK, every=4, boundary_bytes=GB)
    assert work.spooled_bytes == (10 + 6) * GB
    assert seconds(work, PACE)["again"] == pytest.approx(12 + 6 + 0.5)
    assert replace(work, boundaries_cached=False).spooled_bytes == (10 + 6 + 10) * GB


def test_what_reading_asks_of_the_cores_adds_to_the_arithmetic() -> None:
    busy = replace(PACE, forward=3.0, reading_work=0.5 / GB)
    forward = next(p for p in forecast(WORK, busy).phases if p.name == "forward")
    assert forward.arithmetic == pytest.approx(30 + 10)
    assert forward.seconds == pytest.approx(40 + 2)


def test_embedding_and_head_are_a_phase_of_their_own_only_where_extracted() -> None:
    assert "ends" not in seconds(WORK, PACE)
    assert seconds(WORK, replace(PACE, ends=4.0))["ends"] == pytest.approx(1 + 4)


def test_the_limit_is_the_larger_side() -> None:
    flop = 8 * 10 * GB * 512 + 4 * 10**8 * 500
    assert WORK.flop == flop
    scoring = 14 * 10 * GB * 4 / 50e9
    assert limit_seconds(WORK, 1e6, 1e12, 50e9) == pytest.approx(WORK.read_bytes / 1e6)
    assert limit_seconds(WORK, 1e12, 1e12, 50e9) == pytest.approx(flop / 1e12 + scoring)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_work_is_read_off_headers(every: int, tmp_path: Path) -> None:
    from commands import build_inputs
    from pkt import api

    inputs = build_inputs(tmp_path)
    seeds = assumed_seeds(3, 7, 128)
    paths = str(inputs.teacher), str(inputs.student)
    task = api.prepare(*paths, seeds, max_ram="2GiB", spool_every=every)
    work, layer = work_of(task, "direct", 4 << 30), task.teacher.checkpoint.layers[0]
    assert (work.layers, work.seeds, work.tokens, work.loss_tokens) == (4, 3, 21, 18)
    assert work.layer_bytes == sum(piece.bytes for piece in layer.values())
    assert work.read_bytes == task.plan.read_bytes
    assert work.again == task.plan.recomputed_layers == {1: 0, 2: 1, 3: 2}[every]
    less = str(task.plan.peak_bytes - 1)  # a slot less
    tight = replace(task, plan=api.prepare(*paths, seeds, max_ram=less, spool_every=every).plan)
    assert tight.plan.slots == task.plan.slots - 1
    assert work_of(tight, "direct", 4 << 30).read_bytes == tight.plan.read_bytes
    assert work.boundary_bytes == 21 * 48 * 4
    assert work.boundaries_cached
    assert not work_of(task, "direct", 0).boundaries_cached
    one_slot = replace(task, plan=replace(task.plan, slots=1))
    assert work_of(one_slot, "buffered", 4 << 30).cached_bytes == 3 * work.layer_bytes
    assert work_of(one_slot, "direct", 4 << 30).cached_bytes == 0


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ([5], [5]),
        ([5, 3, 1], [1, 3, 5]),  # all of them: fewer tokens than wanted
        ([100, 300, 200], [200]),
        ([10] * 50, [10] * 10),
        ([1, 60, 2, 40, 3], [1, 2, 40, 60]),
        ([30, 80, 30, 80], [30, 80]),
    ],
)
def test_few_seeds_of_many_lengths(lengths: list[int], chosen: list[int]) -> None:
    samples = [Sample(str(n), (0,) * n, (False,) * n) for n in lengths]
    assert [len(sample.tokens) for sample in sampled(samples, 100)] == chosen


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "qwen2_sliding"])
def test_a_model_of_two_layers_is_still_one(family: str, tmp_path: Path) -> None:
    import torch

    from pkt.sweep import build_skeleton

    model = open_model(str(tiny.build(family, tmp_path / "model")), {})
    cut = first_layers(model, tmp_path / "cut")
    assert cut.layers == 2
    assert len(build_skeleton(cut.folder, torch.float32).layers) == 2
    assert first_layers(model, tmp_path / "whole", 99).layers == model.layers


@pytest.mark.parametrize(
    ("time", "said"),
    [
        (0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"),
        (200, "3 min 20 s"), (3599.6, "1 h 0 min"), (6720, "1 h 52 min"), (7199, "2 h 0 min"),
    ],
)  # fmt: skip
def test_times_for_people(time: float, said: str) -> None:
    assert duration(time) == said


def test_assumed_seeds_count_all_but_the_first_token() -> None:
    seeds: Any = assumed_seeds(2, 5, 3)
    assert (seeds.tokens, seeds.loss_tokens, seeds.longest) == (10, 8, 5)
    assert seeds.samples[0].tokens == (0, 1, 2, 0, 1)
