"""The comparison of slices sees an element that is missing, doubled or wrong, and says where."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fp4.comm.rect import Rectangle, Shard
from tests.helpers.slices import assert_slices, largest_error

WHOLE = torch.arange(1.0, 13.0).view(4, 3)
REFERENCE = {"w": WHOLE}


def shard(low: int, high: int, **change: float) -> Shard:
    """Rows `[low, high)`. change: factor on all elements, or one more value in the first."""
    where = Rectangle("w", (4, 3), (low, 0), (high - low, 3))
    values = WHOLE[where.slices] * change.get("factor", 1.0)
    values[0, 0] += change.get("more", 0.0)
    return Shard(where, {"values": values})


def test_right_slices_pass() -> None:
    assert_slices(REFERENCE, [[shard(0, 1)], [shard(1, 2), shard(2, 4)]], within=0.0)


def test_an_error_is_relative_to_the_logical_tensor_and_names_tensor_and_rank() -> None:
    ranks = [[shard(0, 2)], [shard(2, 4, more=1.0)]]
    expected = math.sqrt(1.0 / 6) / float(WHOLE.square().mean().sqrt())
    assert largest_error(REFERENCE, ranks) == pytest.approx(expected)
    with pytest.raises(AssertionError, match=r"w on rank 1 of 2: off by 5\.5e-02, allowed is 1e-02"):
        assert_slices(REFERENCE, ranks, within=1e-2)
    assert largest_error(REFERENCE, [[shard(0, 4, factor=2.0)]]) == pytest.approx(1.0)
    assert largest_error(REFERENCE, [[shard(0, 4, more=math.nan)]]) == math.inf


def test_every_element_counts_once() -> None:
    for ranks in ([[shard(0, 2)], [shard(3, 4)]], [[shard(0, 3)], [shard(2, 4)]], []):
        with pytest.raises(AssertionError, match="w: not every element was computed once"):
            assert_slices(REFERENCE, ranks, within=1.0)
    with pytest.raises(AssertionError, match="the reference has no such tensor"):
        assert_slices({}, [[shard(0, 4)]], within=1.0)
