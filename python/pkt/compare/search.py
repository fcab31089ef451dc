"""Each arm's own learning rate: a grid in steps of about √10, extended past a best edge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

START = (3e-4, 1e-3, 3e-3)
LOWEST, HIGHEST = 1e-6, 1.0


def best_rate(
    measure: Callable[[float], float], rates: Sequence[float], untrained: float = math.inf
) -> dict[float, float]:
    """Validation loss of each learning rate that was tried; the best is never at an edge.

    A loss may have two valleys: where every rate does harm, a much smaller one may not.

    Args:
        measure: trains with a rate and returns the validation loss (infinite if it diverged).
        rates: the grid to begin with.
        untrained: the loss without training.

    Returns:
        loss by rate. The best one has a neighbour on either side, and is no worse than
        ``untrained``, unless the next rate would lie outside of 1e-6 to 1.

    """
    found: dict[float, float] = {}
    waiting = sorted(set(rates))
    while waiting:
        for rate in waiting:
            found[rate] = measure(rate)
        tried = sorted(found)
        best = chosen_rate(found)
        waiting = []
        harmful = found[best] > untrained
        if (best == tried[0] or harmful) and (lower := neighbour(tried[0], -1)) >= LOWEST:
            waiting.append(lower)
        if best == tried[-1] and (higher := neighbour(best, 1)) <= HIGHEST:
            waiting.append(higher)
    return found


def chosen_rate(found: dict[float, float]) -> float:
    """The rate of the lowest loss; of equals the smallest."""
    return min(sorted(found), key=lambda rate: found[rate])


def neighbour(rate: float, direction: int) -> float:
    """The next rate of the series 1, 3, 10, 30, … above (1) or below (-1), to one digit."""
    exponent = math.floor(math.log10(rate * (1 + 1e-9)))
    lead = rate / 10**exponent
    if direction > 0:
        step = (3, exponent) if lead < 3 * (1 - 1e-9) else (1, exponent + 1)
    elif lead > 3 * (1 + 1e-9):
        step = (3, exponent)
    elif lead > 1 + 1e-9:
        step = (1, exponent)
    else:
        step = (3, exponent - 1)
    return float(f"{step[0]}e{step[1]}")
