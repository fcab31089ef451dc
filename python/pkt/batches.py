"""Which seeds go forward through a layer together.

A product of a few rows runs at a part of the rate of a large one, and training examples are short.
Where no gradient of one seed is asked for, seeds of like length share a call, the shorter ones
padded on the right: attention looks back only, so what is behind a seed changes nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence

BATCH_TOKENS = 512  # rows of a batch, unless one seed alone has more
MOST_PADDING = 8  # a seed is at least so many ninths of the longest of its batch


def batches(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Seeds by number, each once, the shortest first; by their lengths alone.

    Args:
        lengths: tokens of each seed, above 0.

    Returns:
        batches of at most `BATCH_TOKENS` rows with their padding, or of one longer seed.

    """
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: lengths[n]):
        length = lengths[number]
        last = found[-1] if found else []
        alike = bool(last) and lengths[last[0]] * (MOST_PADDING + 1) >= length * MOST_PADDING
        if alike and (len(last) + 1) * length <= BATCH_TOKENS:
            last.append(number)
        else:
            found.append([number])
    return [tuple(batch) for batch in found]


def most_rows(lengths: Sequence[int]) -> int:
    """What no batch of these seeds, or of some of them, has more rows than."""
    return max(max(lengths), min(BATCH_TOKENS, sum(lengths)))


def shapes(lengths: Sequence[int]) -> int:
    """How many shapes (seeds, rows) batches have."""
    return len({(len(batch), lengths[batch[-1]]) for batch in batches(lengths)})
