"""How parameters lie in flat buckets, and which elements of them each data-parallel rank owns.

A bucket is a flat range cut into equal contiguous parts, one per rank, which is what NCCL's reduce-scatter and
all-gather take. Parameters and cuts lie on multiples of `ALIGN` elements and nowhere else: a rank's piece of a
parameter begins and ends anywhere in a row, and what that is as rectangles the placement says.

    bucket    | w0 row row row row row row .. | w1 row row row |gap| w2 row row |
    parts     |  rank 0        |  rank 1         |  rank 2         |  rank 3    |

The gap makes up for the rounding. In a small bucket, or one of thousands of ranks, it is larger than a part, and the
ranks in it own nothing of this bucket; it moves on from one bucket to the next, so that these are not always the same
ranks. Still a rank may own nothing at all, and takes part in every collective.

torch's fused kernel computes the last few elements of a tensor (less than a vector) in another precision; with cuts on
multiples of `ALIGN` these are the last ones of the parameter at every data-parallel size. Not here: communication
(bucket_comm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement

ALIGN = 64  # elements; 128 bytes in BF16, what vectorised loads and tensor cores ask for


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
    def stop(self) -> int:
        return self.start + self.parameter.numel()


@dataclass(frozen=True, eq=False)
class ParameterPiece:
    """Elements `[start, stop)` of a parameter, at element `offset` of the owner's part of the bucket."""

    slot: Slot
    start: int
    stop: int
    offset: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BucketKind:
    """What all parameters of a bucket share.

    group: the ranks over which it is summed and divided: dp x cp, or, of experts, those that hold the same ones.
    tp_summed: the tensor-parallel ranks hold partial gradients. tied_group: the stages that hold a copy. A bucket with
    either is reduced at the end of the step, with its replicas, whose sums stay bit-equal.
    matrices: they are updated as matrices, by Muon. blocks: their rows are whole blocks of moments (kept/codes.py).
    sums: type in which a rank sums their gradients.
    """

    dtype: torch.dtype
    device: torch.device
    group: Group
    tp_summed: bool = False
    tied_group: Group | None = None
    matrices: bool = False
    blocks: bool = False
    sums: torch.dtype = torch.float32

    @property
    def deferred(self) -> bool:
        return self.tp_summed or self.tied_group is not None


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters that are reduced and gathered by one collective; `num_parts` ranks have `part_numel` elements each."""

    kind: BucketKind
    slots: tuple[Slot, ...]
    part_numel: int
    num_parts: int

    @property
    def group(self) -> Group:
        """The ranks that share it."""
        return self.kind.group

    @property
    def numel(self) -> int:
        return self.part_numel * self.num_parts

    def part(self, flat: Tensor, rank: int) -> Tensor:
        """`rank`'s part of `flat [numel]`, a view."""
        return flat.narrow(0, rank * self.part_numel, self.part_numel)

    def pieces(self, rank: int) -> list[ParameterPiece]:
        """What `rank` owns, in flat order; may be nothing."""
        low = rank * self.part_numel
        cuts = [(max(slot.start, low), min(slot.stop, low + self.part_numel), slot) for slot in self.slots]
        return [
            ParameterPiece(slot, first - slot.start, stop - slot.start, first - low)
            for first, stop, slot in cuts
            if first < stop
        ]


def make_buckets(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group: Group,
    *,
    bucket_numel: int,
    sum_replicated_over_tp: bool,
    as_matrix: Callable[[LogicalParameter], bool] = lambda parameter: False,
    edp: Group | None = None,
    in_blocks: Callable[[LogicalParameter], bool] = lambda parameter: False,
    sum_dtype: Callable[[LogicalParameter, int], torch.dtype] = lambda parameter, replicas: torch.float32,
) -> list[Bucket]:
    """Lay the parameters out, last one first (the order in which backward finishes them), deferred buckets last.

    bucket_numel: a bucket is closed when it holds at least this many elements. as_matrix: which parameters are updated
    as matrices; in_blocks: which have moments in blocks; both have buckets of their own, and so has each type in which
    gradients are summed (sum_dtype, of the parameter and the size of its group). edp: the group of experts, `group`
    that of all others. Raises ValueError for a parameter without a valid placement, a frozen one, a scalar, or
    one given twice.
    """
    waiting: dict[BucketKind, list[tuple[str, LogicalParameter]]] = {}
    closed: list[tuple[BucketKind, list[tuple[str, LogicalParameter]]]] = []
    seen: dict[int, str] = {}
    for name, parameter in reversed(list(named_parameters)):
        if id(parameter) in seen:
            raise ValueError(f"{name} and {seen[id(parameter)]} are the same parameter; pass it once")
        seen[id(parameter)] = name
        checked = _checked(name, parameter)
        shared_by = edp if edp is not None and checked.placement.of_experts else group
        kind = BucketKind(
            checked.dtype,
            checked.device,
            shared_by,
            tp_summed=checked.placement.tp_replicated and sum_replicated_over_tp,
            tied_group=checked.tied_group,
            matrices=as_matrix(checked),
            blocks=in_blocks(checked),
            sums=sum_dtype(checked, shared_by.size),
        )
        members = waiting.setdefault(kind, [])
        members.append((name, checked))
        if sum(member[1].numel() for member in members) >= bucket_numel:
            closed.append((kind, members))
            del waiting[kind]
    closed += waiting.items()
    closed.sort(key=lambda each: each[0].deferred)
    numbers = [0 if kind.tied_group is not None else number for number, (kind, _) in enumerate(closed)]
    return [_make_bucket(kind, members, number) for number, (kind, members) in zip(numbers, closed, strict=True)]


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


def _make_bucket(kind: BucketKind, members: Sequence[tuple[str, LogicalParameter]], number: int) -> Bucket:
    """number: the gap lies after all parameters (0), after all but one, ..., before all, and so on.

    It is 0 for tied copies, which are summed part by part: every stage must cut them at the same elements, whatever
    other buckets it has.
    """
    num_parts = kind.group.size
    used = sum(_round_up(parameter.numel(), ALIGN) for _, parameter in members)
    part_numel = _round_up(-(-used // num_parts), ALIGN)
    first_after_gap = len(members) - number % (len(members) + 1)
    slots, start = [], 0
    for index, (name, parameter) in enumerate(members):
        if index == first_after_gap:
            start += part_numel * num_parts - used
        slots.append(Slot(name, parameter, start))
        start += _round_up(parameter.numel(), ALIGN)
    return Bucket(kind, tuple(slots), part_numel, num_parts)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
