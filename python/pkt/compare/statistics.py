"""Is one arm better than another? Paired bootstrap over test examples and repeats.

Both arms are measured on the same examples with the same random seeds, so differences are taken
example by example and seed by seed, before anything is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_BLOCK = 1_000


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean loss of one arm less that of another, nats a token; negative is better."""

    mean: float
    low: float  #: 95 % interval
    high: float
    p: float  #: two-sided


def paired_difference(
    arm: NDArray[np.float64], other: NDArray[np.float64], tokens: NDArray[np.float64], seed: int = 0
) -> Difference:
    """Difference of two arms' mean loss a token, with its bootstrap interval and p-value.

    Args:
        arm: Σ nll of each test example, nats, (repeats, examples).
        other: the same of the other arm, repeat by repeat and example by example.
        tokens: that count in each example, (examples,).
        seed: of the resampling.

    Each resample draws examples and repeats with replacement; p = 2·min(share ≤ 0, share ≥ 0),
    with one resample added to both, so never 0. Few repeats cannot show how far seeds differ: where
    that is most of the noise, a true null is rejected at 5 % in about a quarter of the cases with
    three repeats. Source: Efron and Tibshirani, An Introduction to
    the Bootstrap, 1993, §13 and §16.

    """
    change = arm - other
    repeats, examples = change.shape
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, RESAMPLES, _BLOCK):
        count = min(_BLOCK, RESAMPLES - start)
        weights = generator.multinomial(examples, [1 / examples] * examples, count)
        shares = generator.multinomial(repeats, [1 / repeats] * repeats, count) / repeats
        drawn.append(((shares @ change) * weights).sum(axis=1) / (weights @ tokens))
    found = np.concatenate(drawn)
    low, high = np.percentile(found, [2.5, 97.5])
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
    mean = float(change.mean(axis=0).sum() / tokens.sum())
    return Difference(mean, float(low), float(high), p)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over repeats; NaN for one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
