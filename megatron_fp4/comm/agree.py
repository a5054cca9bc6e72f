"""All ranks of one mind: an error of one rank is an error of all, so nobody waits in the next collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def from_first(read: Callable[[], T], group: Group) -> T:
    """Rank 0 looks at the file system and the others believe it: clients of a shared one may see it differently."""
    return collectives.broadcast_object(read() if group.rank == 0 else None, group)


def gather_to_first(value: Any, group: Group) -> list[Any]:
    """The value of every rank on rank 0, an empty list elsewhere: plans of all ranks are needed in one place only."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.gather_object(value, values if group.rank == 0 else None, dst=group.ranks[0], group=group.process_group)
    return values if group.rank == 0 else []


def shared_error(error: str | None, group: Group) -> str | None:
    """Every rank's errors as one text, the same on all; None if there are none."""
    return joined(collectives.all_gather_object(error, group))


def joined(errors: Sequence[str | None]) -> str | None:
    """Errors by rank as one text, or None."""
    told = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
    return "; ".join(told[:MAX_LISTED]) or None
