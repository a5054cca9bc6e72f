"""Rectangles of logical tensors: their elements, the pieces of a fused parameter, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Placement, Rectangle, Shard, split_evenly


def test_split_evenly_names_the_numbers() -> None:
    group = Group("tp", (0,), 0)
    assert split_evenly(6, group, what="heads") == 6
    with pytest.raises(ValueError, match=r"6 .* not a multiple of 4"):
        split_evenly(6, group, what="heads", multiple_of=4)


def test_elements_of_a_fused_parameter_are_rectangles_of_its_parts() -> None:
    placement = Placement((Rectangle("q", (8, 3), (4, 0), (4, 3)), Rectangle("k", (4, 3), (2, 0), (2, 3))))
    assert list(placement.elements(2, 16)) == [
        Rectangle("q", (8, 3), (4, 2), (1, 1)),
        Rectangle("q", (8, 3), (5, 0), (3, 3)),
        Rectangle("k", (4, 3), (2, 0), (1, 3)),
        Rectangle("k", (4, 3), (3, 0), (1, 1)),
    ]
    assert [rows for rows, _ in placement.pieces()] == [slice(0, 4), slice(4, 6)]


@pytest.mark.parametrize("shape", [(30,), (5, 6), (4, 1, 3), (3, 2, 5), (2, 3, 1, 4)])
def test_any_range_of_elements_is_a_few_rectangles_in_order(shape: tuple[int, ...]) -> None:
    logical = torch.arange(2 * math.prod(shape)).view(*shape[:-1], -1)  # the rectangle is the right half
    where = Rectangle("w", tuple(logical.shape), (*[0] * (len(shape) - 1), shape[-1]), shape)
    flat = logical[where.slices].reshape(-1)
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            parts = list(where.elements(start, stop))
            assert len(parts) <= 2 * len(shape) - 1
            assert all(part.numel for part in parts), "an empty rectangle"
            values = torch.cat([flat[:0], *(logical[part.slices].reshape(-1) for part in parts)])
            assert torch.equal(values, flat[start:stop]), f"[{start}, {stop}) is {parts}"


def test_a_rectangle_is_its_part_of_the_logical_tensor() -> None:
    logical = torch.arange(40).view(5, 8)
    where = Rectangle("w", (5, 8), (1, 2), (3, 4))
    assert torch.equal(logical[where.slices], logical[1:4, 2:6])
    assert torch.equal(logical[where.rows(1, 3).slices], logical[2:4, 2:6])
    assert where.index(1).tolist() == [2, 3, 4, 5]
    assert torch.equal(logical[Rectangle.whole("w", (5, 8)).slices], logical)


def test_what_is_no_rectangle_is_refused() -> None:
    for offset, shape in (((3, 0), (3, 8)), ((0, 4), (5, 5)), ((-1, 0), (2, 8)), ((0,), (5, 8))):
        with pytest.raises(ValueError, match=r"w: .* is not inside the logical shape \(5, 8\)"):
            Rectangle("w", (5, 8), offset, shape)
    with pytest.raises(ValueError, match=r"master/w has shape \(2, 8\), its place is"):
        Shard(Rectangle.whole("w", (5, 8)), {"master": torch.zeros(2, 8)})


def test_a_placement_of_rows_that_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k: .* does not fit below"):
        Placement((Rectangle.whole("q", (4, 3)), Rectangle.whole("k", (4, 2))))
    with pytest.raises(ValueError, match=r"k: .* is empty"):
        Placement((Rectangle.whole("q", (4, 3)), Rectangle("k", (4, 3), (4, 0), (0, 3))))
