"""All ranks of one mind: an error of one rank is an error of all, so nobody waits in the next collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_fp4.comm import collectives
from megatron_fp4.comm.mesh import Group

T = TypeVar("T")
MAX_LISTED = 20


def agreed(make: Callable[[], T], group: Group) -> T:
    """`make()` of this rank; or the ValueErrors of any ranks, as one ValueError on all."""
    value, error = None, None
    try:
        value = make()
    except ValueError as caught:
        error = str(caught)
    if error := shared_error(error, group):
        raise ValueError(error)
    return cast(T, value)


def decided_by_rank0(decide: Callable[[], T], group: Group, refusal: type[Exception] = ValueError) -> T:
    """`decide()` of rank 0, on all ranks; a `refusal` that it raises is raised on all.

    Rank 0 looks at the file system and the others believe it: clients of a shared one may see it differently.
    """
    value, error = None, None
    if group.rank == 0:
        try:
            value = decide()
        except refusal as caught:
            error = str(caught)
    value, error = collectives.broadcast_object((value, error), group)
    if error is not None:
        raise refusal(error)
    return cast(T, value)


def gather_to_rank0(value: Any, group: Group) -> list[Any]:
    """The value of every rank on rank 0, an empty list elsewhere: plans of all ranks are needed in one place only."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.gather_object(value, values if group.rank == 0 else None, dst=group.ranks[0], group=group.process_group)
    return values if group.rank == 0 else []


def shared_error(error: str | None, group: Group) -> str | None:
    """The errors of the first ranks that have one as one text, the same on all; None if there are none."""
    return listed_errors(collectives.tell_first(error or "", group, MAX_LISTED).items())


def listed_errors(errors: Iterable[tuple[int, str]]) -> str | None:
    """The first `MAX_LISTED` errors of (rank, error) as one text that names the ranks; None if there are none."""
    return "; ".join(f"rank {rank}: {error}" for rank, error in islice(errors, MAX_LISTED)) or None


def number_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: [2, 3, 4, 7] -> "2-4,7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
