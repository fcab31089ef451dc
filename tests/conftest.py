"""Offline; pictures of extractions only where asked for; few cases of laws over many."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from zlib import crc32

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


LAWS = ("parity", "end_to_end")  # folders whose tests run whole models
CHEAP = ("test_cli.py", "test_bad_input.py", "test_changed_teacher.py")  # but these, by the case
EACH = 5


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Of a law over more than two cases about a fifth is quick, the others are slow.

    The first, and those that the checksum of their name says: an even step would take the same
    option each time where cases are products. ``-m ""`` runs them all.
    """
    cases = Counter(_law(item) for item in items)
    seen: Counter[str] = Counter()
    for item in items:
        law = _law(item)
        large = item.path.parent.name in LAWS and item.path.name not in CHEAP and cases[law] > 2
        if large and "slow" not in item.keywords:
            if seen[law] and crc32(item.nodeid.encode()) % EACH:
                item.add_marker("slow")
            seen[law] += 1


def _law(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """See `runs`."""
    from runs import pictureless

    with pictureless():
        yield


@pytest.fixture
def pictures() -> Iterator[None]:
    """Extractions of this test draw their pictures."""
    from runs import with_pictures

    with with_pictures():
        yield
