import numpy as np
import pytest

from megatron_fp4.data.order.permute import digest, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 63, 64, 65, 1000, 100_003])
def test_is_a_permutation(size):
    places = permute(digest("k", size), size, np.arange(size))
    assert np.array_equal(np.sort(places), np.arange(size))


def test_one_place_is_the_same_as_all_places():
    key = digest(1)
    whole = permute(key, 1000, np.arange(1000))
    assert [int(permute(key, 1000, np.array([i]))[0]) for i in (0, 17, 999)] == whole[[0, 17, 999]].tolist()


def test_is_frozen():
    """A change here would change the order of every run that is resumed: it needs a new state version."""
    assert permute(digest(1234, "documents", "web", 0), 10, np.arange(10)).tolist() == [8, 3, 0, 5, 2, 6, 7, 1, 4, 9]


def spelled_out(key, size, index):
    """One place in Python's own integers: four rounds on the fewest bits (6 at least) that hold size - 1."""
    words = [int.from_bytes(key[8 * n : 8 * n + 8], "little") for n in range(8)]
    bits = next(b for b in range(6, 64) if size <= 2**b)
    place = index
    while True:
        for r in range(4):
            place = (place * (words[2 * r] | 1) + words[2 * r + 1]) % 2**bits
            place ^= place >> (bits + 1) // 2
        if place < size:
            return place


@pytest.mark.parametrize("size", [2, 10, 63, 64, 65, 128, 129, 1000])
def test_equals_the_rule_in_whole_numbers(size):
    key = digest("rule", size)
    places = permute(key, size, np.arange(size))
    assert places.dtype == permute(key, 1, np.arange(1)).dtype == np.int64
    assert places.tolist() == [spelled_out(key, size, n) for n in range(size)]


def test_all_orders_of_a_small_set_occur():
    orders = {tuple(permute(digest(s), 4, np.arange(4)).tolist()) for s in range(600)}
    assert len(orders) == 24


def test_beyond_two_to_the_31():
    size = 2**33 + 7
    index = np.array([0, 2**31, 2**32 + 1, size - 1])
    places = permute(digest("big"), size, index)
    assert len(set(places.tolist())) == 4
    assert places.min() >= 0
    assert places.max() < size


def test_neighbours_do_not_stay_neighbours():
    places = permute(digest("far"), 1 << 17, np.arange(1 << 17))
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02
    assert 0.32 < np.abs(np.diff(places)).mean() / (1 << 17) < 0.35  # 1/3 for a random order
