"""How parameters lie in flat buckets, and which rows of them each data-parallel rank owns.

A bucket is a flat range cut into one contiguous part per rank, and every cut falls on a row boundary of the parameter
it meets, so a rank's part of a parameter is a range of whole rows, a rectangle.

    bucket    | w0 row row row row row row .. | w1 row row row |pad|        parameters start on aligned positions
    parts     |  rank 0        |  rank 1         |  rank 2         |        equal if a little padding allows it

Equal parts let NCCL use its native reduce-scatter and all-gather without staging copies; where they would need more
than `MAX_PADDING`, the parts are uneven. Cuts inside a parameter fall on multiples of `ALIGN` elements: torch's fused
kernel computes the last few elements of a tensor (less than a vector) in another precision, and this keeps those
elements the same at every data-parallel size. Not here: communication (bucket_comm.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement

ALIGN = 64  # elements; 128 bytes in BF16, what vectorised loads and tensor cores ask for
MAX_PADDING = 0.25  # of a bucket's elements


@dataclass(frozen=True, eq=False)
class Slot:
    """One parameter in a bucket: elements `[start, start + numel)` of the flat buffers."""

    name: str
    parameter: LogicalParameter
    start: int

    @property
    def placement(self) -> Placement:
        return self.parameter.placement

    @property
    def num_rows(self) -> int:
        return self.parameter.shape[0]

    @property
    def row_numel(self) -> int:
        return self.parameter.numel() // self.num_rows

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    @property
    def granule(self) -> int:
        """Elements between two possible cuts: whole rows, and a multiple of ALIGN."""
        return math.lcm(self.row_numel, ALIGN)


@dataclass(frozen=True, eq=False)
class RowRange:
    """Rows `[first_row, stop_row)` of a parameter, at element `offset` of the owner's part of the bucket."""

    slot: Slot
    first_row: int
    stop_row: int
    offset: int

    @property
    def numel(self) -> int:
        return (self.stop_row - self.first_row) * self.slot.row_numel

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop_row - self.first_row, *self.slot.parameter.shape[1:])


@dataclass(frozen=True)
class BucketKind:
    """What all parameters of a bucket share.

    tp_summed: the tensor-parallel ranks hold partial gradients. tied_group: the stages that hold a copy.
    A bucket with either is reduced at the end of the step, in exact rank order, so that replicas stay bit-equal.
    """

    dtype: torch.dtype
    device: torch.device
    tp_summed: bool = False
    tied_group: Group | None = None

    @property
    def deferred(self) -> bool:
        return self.tp_summed or self.tied_group is not None


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters that are reduced and gathered by one collective; `parts[r]` elements belong to rank r."""

    kind: BucketKind
    slots: tuple[Slot, ...]
    parts: tuple[int, ...]

    @property
    def numel(self) -> int:
        return sum(self.parts)

    @property
    def even(self) -> bool:
        return len(set(self.parts)) == 1

    def bounds(self, rank: int) -> tuple[int, int]:
        """First and last-plus-one flat element of `rank`'s part."""
        start = sum(self.parts[:rank])
        return start, start + self.parts[rank]

    def row_ranges(self, rank: int) -> list[RowRange]:
        """The rows that `rank` owns, in flat order."""
        low, high = self.bounds(rank)
        ranges = []
        for slot in self.slots:
            first, stop = (_rows_before(slot, cut) for cut in (low, high))
            if first < stop:
                ranges.append(RowRange(slot, first, stop, slot.start + first * slot.row_numel - low))
        return ranges


def _rows_before(slot: Slot, cut: int) -> int:
    """Rows of the slot that lie before flat position `cut`."""
    inside = min(max(cut - slot.start, 0), slot.parameter.numel())
    assert inside % slot.row_numel == 0, f"{slot.name}: cut inside a row"
    return inside // slot.row_numel


def make_buckets(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group: Group,
    *,
    bucket_numel: int,
    sum_replicated_over_tp: bool,
) -> list[Bucket]:
    """Lay the parameters out, last one first (the order in which backward finishes them), deferred buckets last.

    bucket_numel: a bucket is closed when it holds at least this many elements. Raises ValueError for a parameter
    without a valid placement, a frozen one, a scalar, or one given twice.
    """
    waiting: dict[BucketKind, list[tuple[str, LogicalParameter]]] = {}
    closed: list[Bucket] = []
    seen: dict[int, str] = {}
    for name, parameter in reversed(list(named_parameters)):
        if id(parameter) in seen:
            raise ValueError(f"{name} and {seen[id(parameter)]} are the same parameter; pass it once")
        seen[id(parameter)] = name
        checked = _checked(name, parameter)
        kind = BucketKind(
            checked.dtype,
            checked.device,
            tp_summed=checked.placement.tp_replicated and sum_replicated_over_tp,
            tied_group=checked.tied_group,
        )
        members = waiting.setdefault(kind, [])
        members.append((name, checked))
        if sum(member[1].numel() for member in members) >= bucket_numel:
            closed.append(_make_bucket(kind, members, group.size))
            del waiting[kind]
    closed += [_make_bucket(kind, members, group.size) for kind, members in waiting.items()]
    return sorted(closed, key=lambda bucket: bucket.kind.deferred)


def _checked(name: str, parameter: nn.Parameter) -> LogicalParameter:
    if not isinstance(parameter, LogicalParameter):
        raise ValueError(f"{name} has no .placement; every parameter must say where it lies in its logical tensor")
    if not parameter.requires_grad:
        raise ValueError(f"{name} does not require a gradient; frozen parameters have no optimizer state: leave it out")
    if parameter.dim() == 0 or parameter.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(parameter.shape)}; a parameter needs at least one row of elements")
    covered = parameter.placement.num_rows
    if covered != parameter.shape[0]:
        raise ValueError(f"{name} has {parameter.shape[0]} rows, its placement covers {covered} of them")
    return parameter


def _make_bucket(kind: BucketKind, members: Sequence[tuple[str, LogicalParameter]], size: int) -> Bucket:
    slots: list[Slot] = []
    for name, parameter in members:
        unplaced = Slot(name, parameter, 0)
        end = slots[-1].stop if slots else 0
        slots.append(Slot(name, parameter, _round_up(end, unplaced.granule)))
    return Bucket(kind, tuple(slots), tuple(_part_sizes(slots, size)))


def _part_sizes(slots: Sequence[Slot], size: int) -> list[int]:
    """Elements of each rank: equal parts if the padding they need is small, else cuts near the equal ones."""
    used = slots[-1].stop
    if size == 1:
        return [used]
    even = _round_up(-(-used // size), math.lcm(*(slot.granule for slot in slots)))
    if even * size - used <= MAX_PADDING * used:
        return [even] * size
    cuts = [0, *(_nearest_cut(slots, used * rank // size) for rank in range(1, size)), used]
    return [high - low for low, high in pairwise(cuts)]


def _nearest_cut(slots: Sequence[Slot], position: int) -> int:
    """The possible cut nearest to `position`; monotonic in it."""
    for slot in slots:
        if slot.start < position < slot.stop:
            below = slot.start + (position - slot.start) // slot.granule * slot.granule
            above = min(below + slot.granule, slot.stop)
            return below if position - below <= above - position else above
    return position


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
