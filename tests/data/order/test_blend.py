import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.data.order.blend import MAX_PERIOD, BlendSchedule, integer_weights


def prefix_error(weights, number):
    """Largest |taken - fair share| of any source at any prefix."""
    sources, _ = BlendSchedule(weights).locate(np.arange(number))
    taken = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    fair = np.arange(1, number + 1)[:, None] * np.array(weights) / sum(weights)
    return np.abs(taken - fair).max()


@pytest.mark.parametrize(
    "weights",
    [[1], [1, 1], [0.7, 0.2, 0.1], [0.5, 0.3, 0.2, 0.0], [1e-6, 1.0], [3, 3, 3, 91], [5.5] + [0.45] * 10, [1] * 50],
)
def test_exact_at_every_prefix(weights):
    assert prefix_error(integer_weights(weights), 5000) < 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12).filter(any))
def test_exact_at_every_prefix_for_any_weights(weights):
    """Greedy largest-error-first fails this with many sources."""
    assert prefix_error(integer_weights(weights), 600) < 1


def test_ranks_count_up_and_counts_agree():
    schedule = BlendSchedule((3, 2, 5))
    places = np.arange(57)
    sources, ranks = schedule.locate(places)
    for k in range(3):
        assert ranks[sources == k].tolist() == list(range(int((sources == k).sum())))
    for n in (0, 1, 9, 10, 11, 57):
        assert schedule.counts(n).tolist() == np.bincount(sources[:n], minlength=3).tolist()


def test_is_a_pure_function_however_it_is_asked():
    a, b = BlendSchedule((7, 11, 13)), BlendSchedule((7, 11, 13))
    late = a.locate(np.array([10**12 + 5, 3]))
    b.locate(np.arange(5))
    second = b.locate(np.array([10**12 + 5, 3]))
    assert all(np.array_equal(x, y) for x, y in zip(late, second, strict=True))


def one_by_one(weights, number):
    """The rule of the module's docstring without its heaps: of the open windows, the one that closes first."""
    period, taken, order = sum(weights), [0] * len(weights), []
    for n in range(number):
        place = n % period
        if place == 0:
            taken = [0] * len(weights)
        windows = [
            (-((taken[k] + 1) * period // -w), k)
            for k, w in enumerate(weights)
            if w and taken[k] * period // w <= place
        ]
        k = min(windows)[1]
        order.append((k, n // period * weights[k] + taken[k]))
        taken[k] += 1
    return order


@pytest.mark.parametrize("weights", [(1, 3), (3, 2, 5), (4, 0, 3, 7), (5, 6, 7, 8), (1700, 801, 900)])
def test_the_window_that_closes_first_is_served_however_much_was_asked_before(weights):
    """A period of 3,401 is worked out in pieces: the first 1,024 places, then more."""
    number = min(7000, 3 * sum(weights))
    expected = one_by_one(weights, number)
    schedule = BlendSchedule(weights)
    assert schedule.counts(0).tolist() == [0] * len(weights)
    assert all(len(located) == 0 for located in schedule.locate(np.zeros(0, np.int64)))
    for end in (1, 5, 1025, 1500, 2049, number):
        sources, ranks = schedule.locate(np.arange(min(end, number)))
        assert list(zip(sources.tolist(), ranks.tolist(), strict=True)) == expected[:end]
        assert sources.dtype == ranks.dtype == np.int64, "numbers of samples are whole, beyond 2^53 too"


def test_zero_weight_is_never_taken_and_tiny_weight_is():
    sources, _ = BlendSchedule(integer_weights([0.0, 1e-6, 1.0])).locate(np.arange(1_000_001))
    assert np.bincount(sources, minlength=3).tolist() == [0, 1, 1_000_000]


def test_decimals_are_exact_and_scale_does_not_matter():
    assert integer_weights([0.1, 0.2, 0.7]) == integer_weights([10, 20, 70]) == (1, 2, 7)


def test_long_periods_are_rounded_but_keep_every_source():
    weights = integer_weights([10**13, 7, 3 * 10**12])
    assert sum(weights) == MAX_PERIOD
    assert weights[1] == 1


def test_the_place_that_is_left_goes_to_the_largest_remainder():
    """Tenths of the longest period: 2,000,000.1, 1,000,000.7 and 1,194,303.2 parts; one is left, for the .7."""
    assert MAX_PERIOD == 4_194_304
    assert integer_weights([20_000_001, 10_000_007, 0, 11_943_032]) == (2_000_000, 1_000_001, 0, 1_194_303)
    assert integer_weights([11_943_032, 0, 10_000_007, 20_000_001]) == (1_194_303, 0, 1_000_001, 2_000_000)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [-1.0, 2.0], [float("nan")], [float("inf"), 1.0]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="blend weights"):
        integer_weights(weights)
