"""The measured choice of `--io auto`: what is read for it, and what follows from the rates."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from pkt.checkpoint import Checkpoint, open_checkpoint
from pkt.disk import (
    Stretch,
    choose_io,
    choose_mode,
    held,
    measure,
    measure_modes,
    pages,
    raw_reading,
    reading,
    stretches,
)
from pkt.records import Plan, PlanPart

GB = 10**9
PAGE = 4096


def plan(read_bytes: int = 0, peak: int = 1000, spool: int = 0, slots: int = 2) -> Plan:
    return Plan(
        budget_bytes=peak, budget_source="test", parts=(PlanPart("all", peak),),
        smallest_bytes=peak, slots=slots, scores="layer", read_bytes=read_bytes,
        spool_bytes=spool, adapter_bytes=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny.build("llama", tmp_path_factory.mktemp("disk"), shards=3), 4)


# The choice


@pytest.mark.parametrize(
    ("rates", "mode", "why"),
    [
        ({"direct": 2.0, "buffered": 1.0, "mmap": 1.5}, "direct", "soonest"),
        ({"direct": 1.0, "buffered": 2.0, "mmap": 1.5}, "buffered", "soonest"),
        ({"direct": 1.0, "buffered": 1.5, "mmap": 2.0}, "mmap", "soonest"),
        ({"direct": 1.0, "buffered": 1.09}, "direct", "within a tenth of buffered"),
        ({"direct": 1.0, "buffered": 1.11}, "buffered", "soonest"),
        ({"direct": 1.0, "mmap": 1.05}, "direct", "leaves the cores alone"),
        ({"direct": 1.0, "buffered": 1.0, "mmap": 1.0}, "direct", "soonest"),
        ({"buffered": 1.0, "mmap": 1.1}, "mmap", "soonest"),
        ({"direct": 0.01}, "direct", "the one that was measured"),
    ],
)
def test_the_mode_that_ends_first_but_direct_within_a_tenth(
    rates: dict[str, float], mode: str, why: str
) -> None:
    found = choose_mode(rates, 100 * GB, 0)
    assert found.mode == mode
    assert why in found.reason
    assert found.rates == rates


def test_what_the_page_cache_keeps_for_the_turn_counts_for_all_but_direct() -> None:
    """100 GB at 1.2 GB/s take 83 s, at 1 GB/s 100 s, and 80 s once 20 GB come from the cache."""
    rates = {"direct": 1.2, "buffered": 1.0}
    assert choose_mode(rates, 100 * GB, 0).mode == "direct"
    assert choose_mode(rates, 100 * GB, 20 * GB).mode == "direct", "within a tenth"
    found = choose_mode(rates, 100 * GB, 30 * GB)
    assert found.mode == "buffered"
    assert "at the turn" in found.reason


def test_what_the_page_cache_can_hold_is_not_measured(checkpoint: Checkpoint) -> None:
    enough = checkpoint.bytes + 500
    found = choose_io(checkpoint, plan(spool=500), enough)
    assert (found.mode, found.rates) == ("buffered", {})
    assert choose_io(checkpoint, plan(spool=500), enough - 1, measured=False).mode == "auto"


def test_a_checkpoint_too_small_to_measure_is_read_past_the_cache(checkpoint: Checkpoint) -> None:
    found = choose_io(checkpoint, plan(), 0)
    assert (found.mode, found.rates) == ("direct", {})
    assert "too little" in found.reason


def test_the_files_themselves_are_measured(checkpoint: Checkpoint) -> None:
    small = plan(read_bytes=2 * checkpoint.bytes)
    found = choose_io(checkpoint, small, checkpoint.bytes - 1, stretch_bytes=PAGE)
    assert {"buffered", "mmap"} <= found.rates.keys() <= {"direct", "buffered", "mmap"}
    assert all(rate > 0 for rate in found.rates.values())
    assert found.mode in found.rates


# The measurement


def test_each_way_reads_other_stretches_spread_over_all_files(checkpoint: Checkpoint) -> None:
    seen: dict[str, list[Stretch]] = {"a": [], "b": [], "c": []}

    def noting(name: str):  # type: ignore[no-untyped-def]
        def read(stretch: Stretch) -> int:
            seen[name].append(stretch)
            return stretch.end - stretch.begin

        return read

    found = measure(checkpoint.files, {n: noting(n) for n in seen}, PAGE, 2, 60.0)
    assert all(rate.bytes == 2 * PAGE for rate in found.values())
    everything = [stretch for read in seen.values() for stretch in read]
    assert len(set(everything)) == 6, "no stretch is read twice"
    large = {index for index, (_, size) in enumerate(checkpoint.files) if size > 20_000}
    assert len(large) >= 3
    assert {stretch.file for stretch in everything} >= large


def test_no_stretch_is_begun_after_the_time_is_up(checkpoint: Checkpoint) -> None:
    found = measure_modes(checkpoint.files, PAGE, seconds=-1.0)
    assert all(rate.bytes == 0 and rate.gigabytes_per_second == 0 for rate in found.values())


def test_stretches_are_whole_disjoint_and_as_many_as_there_are(tmp_path: Path) -> None:
    sizes = [10 * PAGE, 100, 3 * PAGE + 1]
    files = [(tmp_path / str(index), size) for index, size in enumerate(sizes)]
    for path, size in files:
        path.write_bytes(os.urandom(size))
    every = [Stretch(0, at * PAGE, (at + 1) * PAGE) for at in range(10)]
    every += [Stretch(2, at * PAGE, (at + 1) * PAGE) for at in range(3)]
    assert stretches(files, PAGE, 100) == every
    assert stretches(files, PAGE, 13) == every
    few = stretches(files, PAGE, 4)
    assert len(set(few)) == 4
    assert few[-1].file == 2
    assert stretches(files, 11 * PAGE, 4) == []


def test_holes_are_left_out(tmp_path: Path) -> None:
    path, block = tmp_path / "sparse", 1 << 20
    with path.open("wb") as file:
        file.write(os.urandom(block))
        file.seek(5 * block)
        file.write(os.urandom(block))
        file.truncate(9 * block)
    if path.stat().st_blocks * 512 > 4 * block:
        pytest.skip("this file system has no holes")
    files = [(path, 9 * block)]
    assert list(held(files)) == [(0, 0, block), (0, 5 * block, 6 * block)]
    assert [s.begin for s in stretches(files, block, 8)] == [0, 5 * block]
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    os.truncate(empty, 3 * block)
    assert stretches([(empty, 3 * block)], block, 8) == []


@pytest.mark.parametrize("mode", ["mmap", "buffered", "direct", "raw", "raw direct"])
def test_what_is_timed_is_read(mode: str, tmp_path: Path) -> None:
    content = os.urandom(20 * PAGE + 100)
    path = tmp_path / "file"
    path.write_bytes(content)
    files, memory = [(path, len(content))], pages(20 * PAGE)
    stretch = Stretch(0, 3 * PAGE, 19 * PAGE)
    with ThreadPoolExecutor(2) as pool:
        if mode.startswith("raw"):
            read = raw_reading(files, mode.endswith("direct"), memory, pool)
        else:
            read = reading(files, mode, memory)
        assert read(stretch) == 16 * PAGE
    assert np.array_equal(memory[: 16 * PAGE], np.frombuffer(content[3 * PAGE : 19 * PAGE], "u1"))


def test_the_choice_leaves_the_identity_of_a_run_alone(tmp_path: Path) -> None:
    from commands import build_inputs
    from pkt import api
    from pkt.records import Reading

    inputs = build_inputs(tmp_path)
    task = api.prepare(str(inputs.teacher), str(inputs.student), inputs.seeds, rank=2)
    before = task.identity()
    made = api.execute(task, tmp_path / "out", io=Reading("mmap", "a test", {"mmap": 1.0}))
    assert task.identity() == before
    assert "io" not in made.manifest["options"]
    assert (made.run["io"], made.run["io_reason"]) == ("mmap", "a test")
    assert made.run["io_rates"] == {"mmap": 1.0}
    again = api.execute(replace(task), tmp_path / "out", io="direct")
    assert again.manifest == made.manifest, "another mode is no other run"
