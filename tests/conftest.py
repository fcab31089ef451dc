"""Offline; pictures of extractions only where asked for; few cases of laws over many."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


LAWS = ("parity", "end_to_end")  # folders whose tests run whole models
EACH = 3


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Of a law over more than two cases each third is quick, the others are slow.

    ``-m ""`` runs them all.
    """
    cases = Counter(_law(item) for item in items)
    seen: Counter[str] = Counter()
    for item in items:
        law = _law(item)
        if item.path.parent.name in LAWS and cases[law] > 2 and "slow" not in item.keywords:
            if seen[law] % EACH:
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
