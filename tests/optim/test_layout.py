"""Buckets: equal parts, every element owned once, ranks that own nothing are few and not always the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement
from megatron_fp4.optim.layout import ALIGN, Bucket, make_buckets


class FakeGroup(Group):
    """A group of several ranks that nothing communicates over."""

    def __init__(self, size: int) -> None:
        object.__setattr__(self, "name", "dp_cp")
        object.__setattr__(self, "ranks", tuple(range(size)))
        object.__setattr__(self, "rank", 0)


def parameter(name: str, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LogicalParameter:
    return LogicalParameter.whole(name, torch.zeros(shape, dtype=dtype, device=device))


def lay_out(shapes: list[tuple[int, ...]], size: int, bucket_numel: int = 1, device: str = "cpu") -> list[Bucket]:
    named = [(f"p{i}", parameter(f"p{i}", *shape, device=device)) for i, shape in enumerate(shapes)]
    return make_buckets(named, FakeGroup(size), bucket_numel=bucket_numel, sum_replicated_over_tp=False)


shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 300)),
        st.tuples(st.integers(1, 60), st.integers(1, 70)),
        st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(1, 9)),
    ),
    min_size=1,
    max_size=6,
)


@given(shapes, st.integers(1, 70), st.sampled_from([1, 500, 10**6]))
@settings(max_examples=150, deadline=None)
def test_every_element_is_owned_exactly_once(sizes: list[tuple[int, ...]], ranks: int, bucket_numel: int) -> None:
    buckets = lay_out(sizes, ranks, bucket_numel)
    owned = {f"p{i}": torch.zeros(shape, dtype=torch.int64) for i, shape in enumerate(sizes)}
    for bucket in buckets:
        flat = torch.arange(bucket.numel)
        for rank in range(ranks):
            part = bucket.part(flat, rank)
            for piece in bucket.pieces(rank):
                values = part[piece.offset : piece.offset + piece.numel]
                expected = torch.arange(piece.slot.start + piece.start, piece.slot.start + piece.stop)
                assert torch.equal(values, expected), "shifted elements"
                assert piece.start % ALIGN == 0, "a cut that changes which elements the kernel's tail computes"
                for where in piece.slot.placement.elements(piece.start, piece.stop):
                    owned[where.name][where.slices] += 1
    assert all(bool((count == 1).all()) for count in owned.values()), "an element is lost or owned twice"


@given(shapes, st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_slots_do_not_overlap_and_are_aligned(sizes: list[tuple[int, ...]], ranks: int) -> None:
    for bucket in lay_out(sizes, ranks, bucket_numel=10**6):
        end = 0
        for slot in bucket.slots:
            assert slot.start >= end, "two parameters share elements"
            assert slot.start % ALIGN == 0, "misaligned views slow down or break kernels"
            end = slot.stop
        assert bucket.numel >= end, "a parameter leaves the bucket"


@pytest.mark.parametrize("size", [2, 3, 64, 736])
def test_transformer_shapes_need_little_padding(size: int) -> None:
    block = [(4096,), (6144, 4096), (4096, 4096), (4096,), (16384, 4096), (4096, 16384)]
    buckets = lay_out(block * 2, size, bucket_numel=2**25, device="meta")
    used = sum(2 * math.prod(shape) for shape in block)
    assert sum(bucket.numel for bucket in buckets) < 1.005 * used


def test_the_gap_moves_from_bucket_to_bucket() -> None:
    """Four buckets of two parameters over 100 ranks: 31 ranks have all, and the 69 in the gap are not the same ones."""
    buckets = lay_out([(1, 1000)] * 8, 100, bucket_numel=2000)
    owners = [{rank for rank in range(100) if bucket.pieces(rank)} for bucket in buckets]
    assert [len(of_bucket) for of_bucket in owners] == [32] * 4
    assert owners[0] == set(range(32))
    assert owners[1] == {*range(16), *range(84, 100)}
    assert owners[2] == set(range(68, 100))
    assert owners[3] == owners[0]


@pytest.mark.parametrize(
    ("shape", "owned"),
    [
        ((7, 64), (192, 192, 64)),  # a third of 448 is 149.3, and 192 the next multiple of 64
        ((3, 64), (128, 64)),
        ((4, 64), (128, 128)),
        ((4, 64), (64, 64, 64, 64, 0)),
        ((2, 64), (64, 64, 0, 0)),
        ((5, 30), (128, 22)),  # the first has four rows and the beginning of the fifth
    ],
)
def test_parts_are_equal_multiples_of_64_and_the_last_ones_get_what_is_left(
    shape: tuple[int, ...], owned: tuple[int, ...]
) -> None:
    (bucket,) = lay_out([shape], len(owned), bucket_numel=10**6)
    assert tuple(sum(piece.numel for piece in bucket.pieces(rank)) for rank in range(len(owned))) == owned
    assert bucket.part_numel == owned[0]


def test_buckets_follow_backward_order_and_split_by_dtype() -> None:
    named = [
        ("a", parameter("a", 8, 64)),
        ("b", parameter("b", 8, 64, dtype=torch.bfloat16)),
        ("c", parameter("c", 8, 64)),
        ("d", parameter("d", 8, 64)),
    ]
    buckets = make_buckets(named, FakeGroup(2), bucket_numel=1024, sum_replicated_over_tp=False)
    assert [[slot.name for slot in bucket.slots] for bucket in buckets] == [["d", "c"], ["b"], ["a"]]


def test_replicated_parameters_are_deferred_when_their_gradients_are_partial() -> None:
    norm = parameter("norm", 64)
    norm.placement = Placement(norm.placement.rectangles, tp_replicated=True)
    named = [("w", parameter("w", 8, 64)), ("norm", norm)]
    partial = make_buckets(named, FakeGroup(2), bucket_numel=10**6, sum_replicated_over_tp=True)
    assert [bucket.kind.tp_summed for bucket in partial] == [False, True]
    whole = make_buckets(named, FakeGroup(2), bucket_numel=10**6, sum_replicated_over_tp=False)
    assert [len(bucket.slots) for bucket in whole] == [2]


def test_a_tied_parameter_waits_for_the_end_of_the_step() -> None:
    table = parameter("table", 8, 64)
    table.tied_group = FakeGroup(2)
    named = [("w", parameter("w", 8, 64)), ("table", table)]
    buckets = make_buckets(named, FakeGroup(2), bucket_numel=10**6, sum_replicated_over_tp=False)
    assert [[slot.name for slot in bucket.slots] for bucket in buckets] == [["w"], ["table"]]
    assert [bucket.kind.tied_group for bucket in buckets] == [None, table.tied_group]
    assert [bucket.kind.deferred for bucket in buckets] == [False, True]


def test_refused_parameters() -> None:
    def refused(value: nn.Parameter, message: str, *more: tuple[str, nn.Parameter]) -> None:
        with pytest.raises(ValueError, match=message):
            make_buckets([("w", value), *more], FakeGroup(1), bucket_numel=1, sum_replicated_over_tp=False)

    refused(nn.Parameter(torch.zeros(3)), r"w has no \.placement")
    good = parameter("w", 4, 2)
    refused(good, "v and w are the same parameter|w and v are the same parameter", ("v", good))
    short = parameter("w", 4, 2)
    short.placement = parameter("w", 3, 2).placement
    refused(short, "has 4 rows, its placement covers 3")
    frozen = parameter("w", 4, 2)
    frozen.requires_grad_(False)
    refused(frozen, "w does not require a gradient")
    scalar = LogicalParameter(torch.zeros(()), good.placement)
    refused(scalar, r"shape \(\)")


@pytest.mark.parametrize("others", [0, 1, 2, 3])
def test_tied_copies_are_cut_at_the_same_elements_on_every_stage(others: int) -> None:
    """Their parts are added across stages, which have other numbers of buckets before them."""
    ends, group = FakeGroup(2), FakeGroup(2)
    table = LogicalParameter.whole("embedding.weight", torch.zeros(101, 64))
    table.tied_group = ends
    rest = [(f"w{number}", LogicalParameter.whole(f"w{number}", torch.zeros(64, 64))) for number in range(others)]
    *_, tied = make_buckets([("table", table), *rest], group, bucket_numel=1, sum_replicated_over_tp=False)
    assert tied.kind.tied_group is ends
    assert [slot.start for slot in tied.slots] == [0]
