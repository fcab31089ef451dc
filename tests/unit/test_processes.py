"""Shares of a run, and how a process learns that another is gone."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from pkt import processes, watch
from pkt.errors import PktError, UsageError
from pkt.processes import balanced, joined
from pkt.watch import Watch

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@given(SIZES, st.integers(1, 8))
def test_every_item_has_one_part_and_each_part_its_order(sizes: list[int], parts: int) -> None:
    shares = balanced(sizes, parts)
    assert sorted(item for share in shares for item in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    assert all(shares) == (len(sizes) >= parts)


@given(SIZES, st.integers(1, 8))
def test_parts_differ_by_no_more_than_one_item(sizes: list[int], parts: int) -> None:
    sums = [sum(sizes[item] for item in share) for share in balanced(sizes, parts)]
    assert max(sums) - min(sums) <= max(sizes)


def test_one_process_alone_is_all_of_them() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    processes.sum_in_place(scores)
    assert scores.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert processes.balanced_share([3, 1, 2]) == [0, 1, 2]
    assert processes.largest(-4) == -4
    assert processes.everywhere(True)
    assert not processes.everywhere(False)
    assert processes.from_first("σ") == "σ"
    with joined(1, "cpu"):
        assert processes.is_first()


def test_an_environment_without_a_meeting_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    wanted = r"2 processes, but they cannot meet: .*MASTER_ADDR"
    with pytest.raises(UsageError, match=wanted), joined(2, "cpu"):
        pass


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=datetime.timedelta(seconds=10))


def wait_until(true: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_silence_is_noticed_and_names_the_process(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    ours, theirs = (Watch(store, rank, 2) for rank in range(2))
    theirs._beat(store, 0)
    ours.meet()
    theirs.meet()
    wait_until(lambda: int(store.get("pkt/beat/0")) > 3 * watch.MISSED_BEATS)
    assert ours.lost is None, "while both speak, none is silent"
    theirs._ended.set()
    wait_until(lambda: ours.lost)
    assert ours.loss() == "process 1 (of 0 to 1) has not been heard of for 0 s"
    ours._ended.set()


def test_listening_that_hangs_is_noticed(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)
    ours = Watch(store, 0, 2)
    threading.Thread(target=ours._guard, args=(store,), daemon=True).start()  # no one listens
    wait_until(lambda: ours.lost)
    assert ours.loss() == watch.UNREACHABLE


def test_one_that_fails_says_so(store: TCPStore) -> None:
    ours, theirs = (Watch(store, rank, 2) for rank in range(2))
    assert "another of the 2 processes has ended" in ours.loss(RuntimeError("reset\nmore"))
    theirs.leave()
    assert ours.loss() == "process 1 (of 0 to 1) has ended with an error, which it prints itself"


def test_one_that_failed_before_it_came(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so where the others wait for it."""
    monkeypatch.setattr(processes, "_met", False)
    monkeypatch.setattr(processes, "rendezvous", lambda *args, **more: iter([(store, 1, 2)]))
    processes.withdraw()
    with pytest.raises(PktError, match=r"process 1 \(of 0 to 1\) has ended with an error"):
        Watch(store, 0, 2).meet()


def test_a_call_that_waits_for_ever_is_left_when_another_is_lost(store: TCPStore) -> None:
    ours, never = Watch(store, 0, 2), threading.Event()
    assert processes._attended(lambda: 7, ours) == 7
    with pytest.raises(ValueError, match="mine"):
        processes._attended(lambda: int("mine"), ours)
    ours.lost = "process 1 is gone"
    with pytest.raises(PktError, match="process 1 is gone"):
        processes._attended(never.wait, ours)
    never.set()


def test_one_that_does_not_come(store: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MEET_SECONDS", 0.1)
    with pytest.raises(PktError, match=r"process 1 \(of 0 to 1\) has not come within"):
        Watch(store, 0, 2).meet()


def test_the_first_parts_last(store: TCPStore) -> None:
    """It may hold the store, and a closed connection may fail what has just ended elsewhere."""
    first, second = (Watch(store, rank, 2) for rank in range(2))
    ends: list[int] = []
    threads = [
        threading.Thread(target=lambda r=rank, w=one: (w.part(), ends.append(r)), daemon=True)
        for rank, one in enumerate((first, second))
    ]
    threads[0].start()
    time.sleep(0.1)
    assert not ends
    threads[1].start()
    wait_until(lambda: sorted(ends) == [0, 1])
