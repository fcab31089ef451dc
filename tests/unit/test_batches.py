import random

from hypothesis import given
from hypothesis import strategies as st

from pkt.batches import BATCH_TOKENS, MOST_PADDING, batches, most_rows, shapes

LENGTHS = st.lists(st.integers(1, 2 * BATCH_TOKENS), min_size=1, max_size=60)


@given(LENGTHS)
def test_every_seed_is_in_one_batch(lengths: list[int]) -> None:
    assert sorted(n for batch in batches(lengths) for n in batch) == list(range(len(lengths)))


@given(LENGTHS)
def test_batches_are_small_or_of_one_seed(lengths: list[int]) -> None:
    for batch in batches(lengths):
        rows = len(batch) * max(lengths[n] for n in batch)
        assert rows <= BATCH_TOKENS or len(batch) == 1
        assert rows <= most_rows(lengths)


@given(LENGTHS)
def test_little_of_a_batch_is_padding(lengths: list[int]) -> None:
    for batch in batches(lengths):
        rows = len(batch) * max(lengths[n] for n in batch)
        assert rows - sum(lengths[n] for n in batch) <= rows / (MOST_PADDING + 1)


@given(LENGTHS, st.randoms(use_true_random=False))
def test_the_lengths_alone_decide(lengths: list[int], draw: random.Random) -> None:
    mixed = list(lengths)
    draw.shuffle(mixed)

    def found(given: list[int]) -> list[list[int]]:
        return [[given[n] for n in batch] for batch in batches(given)]

    assert found(lengths) == found(mixed)
    assert shapes(lengths) == shapes(mixed) <= len(batches(lengths))


def test_short_texts_fill_a_batch() -> None:
    assert [len(batch) for batch in batches([64] * 20)] == [8, 8, 4]
