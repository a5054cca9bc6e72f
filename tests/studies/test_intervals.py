"""Intervals of paired gaps: quantiles against a table, coverage and power against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_fp4.studies.intervals import interval_of, percent_gaps, smallest_gap, student_quantile

TABLE = {  # Abramowitz and Stegun, table 26.10
    (0.975, 1): 12.706,
    (0.975, 2): 4.303,
    (0.975, 3): 3.182,
    (0.975, 9): 2.262,
    (0.975, 10): 2.228,
    (0.995, 5): 4.032,
    (0.95, 30): 1.697,
}


@pytest.mark.parametrize(("probability", "freedom"), TABLE)
def test_quantiles_are_those_of_the_table(probability: float, freedom: int) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(TABLE[probability, freedom], abs=6e-4)


def test_many_degrees_are_a_normal_distribution() -> None:
    assert student_quantile(0.975, 5000) == pytest.approx(1.9604, abs=1e-3)


@pytest.mark.parametrize("pairs", [3, 4, 8, 12])
def test_an_interval_holds_the_truth_as_often_as_it_says(pairs: int) -> None:
    """Too few of them: the percentiles of a small sample were taken as they are (88 % with 8 pairs)."""
    drawn = np.random.default_rng(pairs).normal(0.5, 0.3, (400, pairs))
    intervals = [interval_of(gaps.tolist()) for gaps in drawn]
    covered = sum(one.low <= 0.5 <= one.high for one in intervals) / len(intervals)
    assert 0.92 <= covered <= 0.985


@pytest.mark.parametrize("pairs", [4, 10])
def test_the_smallest_gap_is_seen_as_often_as_it_says(pairs: int) -> None:
    spread = 0.3
    gap = smallest_gap(spread, pairs)
    drawn = np.random.default_rng(pairs).normal(gap, spread, (400, pairs))
    seen = sum(interval_of(gaps.tolist()).low > 0 for gaps in drawn) / 400
    assert 0.74 <= seen <= 0.9


def test_a_planted_gap_is_seen_in_twenty_of_twenty() -> None:
    """0.5 percent, with twice the pairs that its spread asks for; losses as runs have them."""
    generator = np.random.default_rng(7)
    spread, planted = 0.2, 0.5
    pairs = 2 * (interval_of([0.0, spread * math.sqrt(2)]).pairs_for(planted) or 0)
    assert 6 <= pairs <= 12
    around = 0
    for _ in range(20):
        reference = 3.0 + generator.normal(0, 0.05, pairs)  # seeds differ by far more than the arms
        arm = reference * (1 + (planted + generator.normal(0, spread, pairs)) / 100)
        interval = interval_of(percent_gaps(arm.tolist(), reference.tolist()))
        assert interval.low > 0
        around += interval.low <= planted <= interval.high
    assert around >= 17


def test_equal_runs_have_a_gap_of_exactly_zero() -> None:
    losses = [3.1, 2.9, 3.3, 3.0]
    interval = interval_of(percent_gaps(losses, losses))
    assert (interval.mean, interval.low, interval.high, interval.smallest) == (0.0, 0.0, 0.0, 0.0)


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="needs two"):
        interval_of([0.1])


def test_pairs_for_is_the_inverse_of_the_smallest_gap() -> None:
    interval = interval_of([0.1, 0.5, -0.2, 0.4])
    pairs = interval.pairs_for(0.2)
    assert pairs is not None
    assert smallest_gap(interval.spread, pairs) <= 0.2 < smallest_gap(interval.spread, pairs - 1)
    assert interval.pairs_for(0.0) is None
