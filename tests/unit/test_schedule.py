"""The order of a sweep: every file is there when it is read, and none is kept for longer."""

from __future__ import annotations

import itertools
import random

import pytest

from pkt.schedule import Step, forward_schedule, peak_boundaries, schedule, turns


def walk(
    steps: list[Step], held: set[int], gradients: int | None, depth: int
) -> tuple[int, set[int]]:
    """Do the steps on sets of names; the most boundaries there were, and what is left."""
    there, most = set(held), len(held)
    for step in steps:
        assert set(step.drops) <= there
        there -= set(step.drops)
        if step.kind == "embed":
            there.add(0)
        elif step.kind == "forward":
            assert step.layer in there
            there.add(step.layer + 1)
        elif step.kind == "head":
            assert depth in there
            gradients = depth
        else:
            assert step.layer in there
            assert gradients == step.layer + 1
            gradients = step.layer
        most = max(most, len(there))
    return most, there


CASES = [(depth, every) for depth in (1, 2, 5, 8) for every in (1, 2, 3, 5, 9)]


@pytest.mark.parametrize(("depth", "every"), CASES)
@pytest.mark.parametrize("last", [False, True])
def test_a_whole_sweep(depth: int, every: int, last: bool) -> None:
    """Each layer twice; once more all but the last of each segment, the last segment excepted."""
    steps = schedule(depth, every, last=last)
    most, left = walk(steps, set(), None, depth)
    backward = [s.layer for s in steps if s.kind == "backward"]
    assert backward == list(reversed(range(depth)))
    forward = [s.layer for s in steps if s.kind == "forward"]
    assert forward[:depth] == list(range(depth))
    end = (depth - 1) // every * every
    extra = [i for i in range(end) if i % every != every - 1]
    assert sorted(forward[depth:]) == extra
    assert [s.kind for s in steps].count("embed") == [s.kind for s in steps].count("head") == 1
    assert (depth in left) == last
    segments = -(-depth // every)
    assert most <= segments + min(every, depth) + 1
    assert most < peak_boundaries(depth, every, last)
    if every == 1:
        assert peak_boundaries(depth, 1, last) == max(depth + 2 + last, 3)


def test_a_square_root_of_the_disk_is_enough() -> None:
    peaks = [peak_boundaries(80, every, False) for every in range(1, 81)]
    assert peaks[0] == 82
    assert min(peaks) == 18
    assert peaks.index(18) + 1 == 9


def test_from_any_state_to_the_end() -> None:
    """Whatever is there, in whatever combination with whatever k: the rest is done, in order."""
    choose = random.Random(0)
    for depth, every, last in itertools.product((1, 4, 7), (1, 2, 3, 8), (False, True)):
        for _ in range(60):
            held = {b for b in range(depth + 1) if choose.random() < 0.5}
            pending = choose.randrange(depth + 1)
            found = [None, *range(pending, depth + 1)]
            upstream = choose.choice(found)
            steps = schedule(
                depth, every, held=held, pending=pending, upstream=upstream, last=last
            )  # fmt: skip
            _, left = walk(steps, held, upstream, depth)
            scored = [s.layer for s in steps if s.kind == "backward" and not s.again]
            assert scored == list(reversed(range(pending)))
            assert not last or depth in left
            if last and pending == 0:
                end = [s.layer for s in steps if s.kind in ("head", "backward")]
                assert (end[-1] if end else upstream) == 0


def test_nothing_is_left_to_do() -> None:
    assert schedule(4, 2, held={0, 2}, pending=0, upstream=0) == []
    assert schedule(4, 2, held={4}, pending=0, upstream=0, last=True) == []


def test_a_larger_k_frees_the_disk_before_anything_is_written() -> None:
    first = schedule(8, 4, held=range(6), pending=8)[0]
    assert (first.kind, first.layer, first.drops) == ("forward", 5, (1, 2, 3))


def test_a_lost_boundary_costs_its_own_segment_only() -> None:
    steps = schedule(8, 1, held={0, 1, 2, 3, 5}, pending=6, upstream=6)
    assert [(s.kind, s.layer) for s in steps[:3]] == [
        ("backward", 5), ("forward", 3), ("backward", 4),
    ]  # fmt: skip


def test_lost_gradients_are_made_from_the_lowest_that_are_there() -> None:
    steps = schedule(4, 1, held={0, 1, 2}, pending=2, upstream=3)
    assert [(s.kind, s.layer, s.again) for s in steps] == [
        ("backward", 2, True), ("backward", 1, False), ("backward", 0, False),
    ]  # fmt: skip


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_segments_turn_too(slots: int) -> None:
    """Of a segment the last layers of its forward half are still there for its backward half."""
    steps = schedule(12, 4)
    order = [s.layer for s in steps if s.kind in ("forward", "backward")]
    kept = turns(order, slots)
    again = sum(s.again for s in steps)
    assert again == 2 * 3
    read = kept.count(None)
    saved = min(slots, 4) + 2 * min(slots - 1, 3)
    assert read == 24 + again - saved


def subsets(count: int) -> list[set[int]]:
    numbers = range(count)
    sizes = range(count + 1)
    return [set(c) for size in sizes for c in itertools.combinations(numbers, size)]


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_pass_forward_comes_by_every_wanted_boundary_once(depth: int) -> None:
    for wanted, held in itertools.product(subsets(depth + 1)[1:], subsets(depth + 1)):
        there, seen, forward = set(held), [], []
        for step in forward_schedule(wanted, held):
            assert set(step.drops) <= there
            there -= set(step.drops)
            if step.kind == "embed":
                there.add(0)
                continue
            assert step.layer in there
            if step.kind == "forward":
                forward.append(step.layer)
                there.add(step.layer + 1)
                assert len(there) == 2, "the inputs of one layer, and its outputs"
            else:
                assert step.kind == "targets"
                seen.append(step.layer)
        assert seen == sorted(wanted)
        start = max((b for b in held if b <= min(wanted)), default=0)
        assert forward == list(range(start, max(wanted)))
        assert forward_schedule([], held) == []
