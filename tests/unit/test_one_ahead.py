"""Windows are read one ahead: in order, no further, and with what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pkt.methods.seeking.steps import _one_ahead


def test_items_come_in_order_and_one_ahead_in_one_thread() -> None:
    made: list[int] = []
    threads = set()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            threads.add(threading.current_thread())
            yield number

    for number in _one_ahead(items()):
        assert len(made) <= number + 2
    assert made == list(range(5))
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert list(_one_ahead(iter(()))) == []


def test_what_goes_wrong_in_the_thread_comes_after_what_was_made() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    found = _one_ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        next(found)


def test_who_stops_early_waits_for_what_is_being_made_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            yield number

    found = _one_ahead(items())
    assert next(found) == 0
    found.close()  # type: ignore[attr-defined]
    assert made in ([0], [0, 1])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pkt-ahead")]
