"""Is one arm better than another? Paired bootstrap over test examples, and the seeds' spread.

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

    Each resample draws examples with replacement and adds what few seeds leave open: s/√R times a
    draw of Student's t with R − 1 degrees of freedom, s the standard deviation of the R repeats'
    own differences (resampling three seeds instead would reject a true null four times too often).
    One repeat has no such term: its interval holds for that seed alone. p = 2·min(share ≤ 0,
    share ≥ 0), with one resample added to both, so never 0. Source: Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, §13 and §16.

    """
    change = arm - other
    repeats, examples = change.shape
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, RESAMPLES, _BLOCK):
        count = min(_BLOCK, RESAMPLES - start)
        weights = generator.multinomial(examples, [1 / examples] * examples, count)
        drawn.append((weights @ change.mean(axis=0)) / (weights @ tokens))
    found = np.concatenate(drawn)
    if repeats > 1:
        each = change.sum(axis=1) / tokens.sum()
        error = each.std(ddof=1) / math.sqrt(repeats)
        found = found + error * generator.standard_t(repeats - 1, RESAMPLES)
    low, high = np.percentile(found, [2.5, 97.5])
    tail = min(int((found <= 0).sum()), int((found >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
    mean = float(change.mean(axis=0).sum() / tokens.sum())
    return Difference(mean, float(low), float(high), p)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over repeats; NaN for one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
