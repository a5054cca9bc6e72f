"""Mixing sources so that the mixture is right at every prefix, not only on average.

With weights w_k that sum to 1, sample m of source k (m = 1, 2, ...) must fall into the window of places
(m-1)/w_k .. m/w_k. Serving, at every place, the open window that closes first always meets all windows when the
weights sum to 1 (a proportionate-fair schedule on one machine), so after any n samples source k was taken
floor(n * w_k) or ceil(n * w_k) times. Greedy "largest error first" does not promise that with many sources.

Weights are integers with a finite period (their sum); the schedule of one period repeats. Decimal weights are exact;
if the period would exceed MAX_PERIOD they are rounded to parts of MAX_PERIOD, each positive one to at least one part.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 1 << 22


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Proportional integers, greatest common divisor 1, sum at most MAX_PERIOD. 0.7 means seven tenths, exactly."""
    if not weights or any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
        raise ValueError(f"blend weights {list(weights)} must be finite, not negative, and not all zero")
    exact = [Fraction(repr(w)) if isinstance(w, float) else Fraction(w) for w in weights]
    scale = math.lcm(*(w.denominator for w in exact))
    parts = [int(w * scale) for w in exact]
    common = math.gcd(*parts)
    parts = [part // common for part in parts]
    return tuple(parts) if sum(parts) <= MAX_PERIOD else _rounded(parts)


def _rounded(parts: list[int]) -> tuple[int, ...]:
    """Largest remainders onto MAX_PERIOD; no positive part becomes zero."""
    total = sum(parts)
    floors = [max(part * MAX_PERIOD // total, 1) if part else 0 for part in parts]
    by_remainder = sorted(range(len(parts)), key=lambda k: (-(parts[k] * MAX_PERIOD % total), k))
    for k in [k for k in by_remainder if parts[k]][: max(0, MAX_PERIOD - sum(floors))]:
        floors[k] += 1
    return tuple(floors)


class BlendSchedule:
    """The order of sources under integer weights; computed once, as far as it was asked for.

    `counts(n)` and `locate(places)` are pure functions of the weights.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        self.weights = np.array(weights, np.int64)
        self.period = int(self.weights.sum())
        self._sources = np.zeros(0, np.int32)  # [computed places of the first period]
        self._ranks = np.zeros(0, np.int64)  # how often the same source came before, within the period
        self._taken = [0] * len(weights)
        self._waiting = [(0, k) for k, w in enumerate(weights) if w]  # (place at which the window opens, source)
        self._open: list[tuple[int, int]] = []  # (place at which the window closes, source)

    def counts(self, num_samples: int) -> NDArray[np.int64]:
        """int64 [sources]: samples of each source among the first `num_samples`."""
        periods, rest = divmod(num_samples, self.period)
        self._extend(rest)
        return periods * self.weights + np.bincount(self._sources[:rest], minlength=len(self.weights))

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each of the places [n], and how many samples of that source came before it."""
        periods, rests = np.divmod(places, self.period)
        self._extend(int(rests.max()) + 1 if len(rests) else 0)
        sources = self._sources[rests].astype(np.int64)
        return sources, periods * self.weights[sources] + self._ranks[rests]

    def _extend(self, places: int) -> None:
        have = len(self._sources)
        if places <= have:
            return
        want = min(self.period, max(places, 2 * have, 1024))
        sources, ranks = np.empty(want - have, np.int32), np.empty(want - have, np.int64)
        weights, period = self.weights.tolist(), self.period
        waiting, ready = self._waiting, self._open
        taken = self._taken
        for place in range(have, want):
            while waiting and waiting[0][0] <= place:
                k = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (-(-(taken[k] + 1) * period // weights[k]), k))
            k = heapq.heappop(ready)[1]
            sources[place - have], ranks[place - have] = k, taken[k]
            taken[k] += 1
            heapq.heappush(waiting, (taken[k] * period // weights[k], k))
        self._sources = np.concatenate([self._sources, sources])
        self._ranks = np.concatenate([self._ranks, ranks])
