"""The mean of a few paired gaps, and how sure it is.

From EXPANDED pairs on the interval is the bootstrap's: means of pairs drawn with replacement, at percentiles that are
widened as a small sample needs (T. Hesterberg, "What Teachers Should Know About the Bootstrap", The American
Statistician 69, 2015, section 4.4: alpha/2 becomes Phi(-sqrt(n / (n - 1)) t)). A sample of fewer pairs has too few
different means to take percentiles of: there it is Student's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
POWER = 0.8
EXPANDED = 8
DRAWS = 20_000
MOST_PAIRS = 10_000


@dataclass(frozen=True)
class Interval:
    """The mean of paired gaps, in percent, with its interval at LEVEL.

    spread: their standard deviation. smallest: the gap that a study of so many pairs with this spread finds different
    from 0 with probability POWER. method: how low and high were made.
    """

    mean: float
    low: float
    high: float
    spread: float
    pairs: int
    smallest: float
    method: str

    def pairs_for(self, gap: float) -> int | None:
        """How many pairs of this spread find `gap` percent with probability POWER; None for more than MOST_PAIRS."""
        pairs, most = 2, MOST_PAIRS
        if smallest_gap(self.spread, most) > abs(gap):
            return None
        while pairs < most:
            middle = (pairs + most) // 2
            pairs, most = (pairs, middle) if smallest_gap(self.spread, middle) <= abs(gap) else (middle + 1, most)
        return pairs


def percent_gaps(arm: Sequence[float], reference: Sequence[float]) -> list[float]:
    """100 (arm / reference - 1), pair by pair."""
    return [100.0 * (one - other) / other for one, other in zip(arm, reference, strict=True)]


def interval_of(gaps: Sequence[float]) -> Interval:
    """Raises ValueError for fewer than two gaps."""
    if len(gaps) < 2:
        raise ValueError(f"{len(gaps)} pair(s) have no spread; an interval needs two")
    equal = len(set(gaps)) == 1
    mean = gaps[0] if equal else statistics.fmean(gaps)
    spread = 0.0 if equal else statistics.stdev(gaps)
    pairs = len(gaps)
    many = pairs >= EXPANDED
    low, high = _bootstrap(gaps) if many else _student_interval(mean, spread, pairs)
    return Interval(mean, low, high, spread, pairs, smallest_gap(spread, pairs), "bootstrap" if many else "Student")


def _student_interval(mean: float, spread: float, pairs: int) -> tuple[float, float]:
    reach = student_quantile((1 + LEVEL) / 2, pairs - 1) * spread / math.sqrt(pairs)
    return mean - reach, mean + reach


def smallest_gap(spread: float, pairs: int) -> float:
    """What `pairs` pairs find with probability POWER: (t_level + t_power) spread / sqrt(pairs)."""
    quantiles = student_quantile((1 + LEVEL) / 2, pairs - 1) + student_quantile(POWER, pairs - 1)
    return quantiles * spread / math.sqrt(pairs)


def student_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with `freedom` degrees, for 0.5 <= probability < 1."""
    low, high = 0.0, 1.0
    while _student(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student(t: float, freedom: int) -> float:
    """P(T <= t), t >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cos, odd = math.cos(angle), freedom % 2
    term = cos if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    total *= math.sin(angle)
    inside = 2 / math.pi * (angle + total) if odd else total
    return 0.5 + inside / 2


def _bootstrap(gaps: Sequence[float]) -> tuple[float, float]:
    """Expanded percentiles of the means of DRAWS samples; the same for the same gaps."""
    values = np.asarray(gaps)
    drawn = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    reach = math.sqrt(len(gaps) / (len(gaps) - 1)) * student_quantile((1 + LEVEL) / 2, len(gaps) - 1)
    tail = statistics.NormalDist().cdf(-reach)
    low, high = np.quantile(values[drawn].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)
