"""Collectives over explicit groups, without autograd.

A sum must not depend on where an element lies in a buffer or which rank reads it. gloo's own reductions add in an order
that depends on the buffer position, and add BF16 in BF16 hop by hop, so replicas drift apart; here, on gloo, a sum is
an all-to-all followed by a local FP32 sum in rank order (which was also measured to be faster). On NCCL the native
reductions are used: they are consistent across ranks, but add in the tensor's own type (BF16 is rounded at every
addition) and in an order that depends on the number of ranks and nodes, and their maximum ignores NaN.

All functions return their input untouched for a group of one rank, and never modify it otherwise. Over a drawn group
nothing travels: the result has its shape and no values. Not here: gradients (autograd.py), and the optimizer's
collectives that are finished later (optim/bucket_comm.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp4.comm.mesh import DrawnGroup, Group

# torch 2.13 renamed these two and warns on the old names; this is the one place that knows.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
warnings.filterwarnings("ignore", message=".*barrier.*device under current context.*")


def uses_gloo(group: Group) -> bool:
    """Whether a group of at least two ranks talks over gloo; else it is NCCL."""
    return dist.get_backend(group.process_group) == "gloo"


def _is_drawn(group: Group, x: Tensor) -> bool:
    if not isinstance(group, DrawnGroup):
        return False
    assert x.is_meta, f"{tuple(x.shape)} on {x.device} cannot travel over {group.name}, which is only drawn"
    return True


def even_counts(num_rows: int, size: int) -> list[int]:
    """Row counts of `size` ranks for `num_rows` rows: as even as possible, the first ranks take the remainder."""
    base, extra = divmod(num_rows, size)
    return [base + (rank < extra) for rank in range(size)]


def _nothing() -> None:
    pass


def all_to_all_rows(
    x: Tensor,
    group: Group,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    while_sending: Callable[[], None] = _nothing,
) -> Tensor:
    """Send `send_counts[r]` consecutive rows of `x` to each rank r; returns the received rows in rank order.

    while_sending: called once the rows are on their way.
    """
    if group.size == 1:
        while_sending()
        return x
    received = x.new_empty((sum(recv_counts), *x.shape[1:]))
    if _is_drawn(group, x):
        while_sending()
        return received
    work = dist.all_to_all_single(
        received, x.contiguous(), list(recv_counts), list(send_counts), group=group.process_group, async_op=True
    )
    while_sending()
    work.wait()
    return received


def reduce_scatter_rows(
    x: Tensor, group: Group, row_counts: Sequence[int] | None = None, while_sending: Callable[[], None] = _nothing
) -> Tensor:
    """Sum `x [R, ...]` over the group; returns this rank's rows of the sum, in `x.dtype`.

    In FP32 and in rank order on gloo, and on NCCL where ranks receive different numbers of rows. Equal numbers of rows
    on NCCL are summed by its own reduce-scatter, in `x.dtype` and in NCCL's order.

    row_counts: rows that each rank receives (default: equal numbers, into which R must divide). while_sending: called
    once the rows are on their way; it may not write `x`.
    """
    if group.size == 1:
        while_sending()
        return x
    if row_counts is None:
        assert x.shape[0] % group.size == 0, f"{x.shape[0]} rows over {group.size} ranks"
        row_counts = [x.shape[0] // group.size] * group.size
    num_rows, uneven = row_counts[group.rank], len(set(row_counts)) > 1
    if _is_drawn(group, x):
        while_sending()
        return x.new_empty((num_rows, *x.shape[1:]))
    if uses_gloo(group) or uneven:
        parts = all_to_all_rows(x, group, row_counts, [num_rows] * group.size, while_sending)
        return ordered_sum(parts.view(group.size, num_rows, *x.shape[1:])).to(x.dtype)
    total = x.new_empty((num_rows, *x.shape[1:]))
    work = _reduce_scatter(total, x.contiguous(), group=group.process_group, async_op=True)
    while_sending()
    work.wait()
    return total


def ordered_sum(parts: Tensor) -> Tensor:
    """Sum over dim 0 one part after the other, in FP32 (FP64 stays FP64): the order never depends on the layout."""
    accumulator = torch.float64 if parts.dtype == torch.float64 else torch.float32
    total = parts[0].to(accumulator)
    if total.data_ptr() == parts.data_ptr():
        total = total.clone()
    for part in parts[1:]:
        total += part
    return total


def all_gather_rows(x: Tensor, group: Group, row_counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate `x` of all ranks along dim 0. row_counts: rows of each rank where they differ."""
    if group.size == 1:
        return x
    if _is_drawn(group, x):
        return x.new_empty((sum(row_counts) if row_counts else x.shape[0] * group.size, *x.shape[1:]))
    if row_counts is None or len(set(row_counts)) == 1:
        out = x.new_empty((x.shape[0] * group.size, *x.shape[1:]))
        _all_gather(_as_bytes(out), _as_bytes(x.contiguous()), group=group.process_group)
        return out
    assert x.shape[0] == row_counts[group.rank], f"{x.shape[0]} rows, {row_counts[group.rank]} announced"
    if uses_gloo(group):  # its all-gather takes equal parts only, its all-to-all any: send the same rows to every rank
        copy_per_rank = x.contiguous().expand(group.size, *x.shape).reshape(-1, *x.shape[1:])
        return all_to_all_rows(copy_per_rank, group, [x.shape[0]] * group.size, row_counts)
    padded = x.new_zeros((max(row_counts), *x.shape[1:]))
    padded[: x.shape[0]] = x
    rows = all_gather_rows(padded, group).view(group.size, max(row_counts), *x.shape[1:])
    return torch.cat([rows[rank, :count] for rank, count in enumerate(row_counts)])


def _as_bytes(x: Tensor) -> Tensor:
    """FP8 tensors travel as bytes: no backend gathers them."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 and x.dtype.is_floating_point else x


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, the same bits on every rank; `x.dtype`, new tensor.

    In FP32 and in rank order on gloo; on NCCL in `x.dtype` and an order of NCCL's.
    """
    if group.size == 1:
        return x
    if _is_drawn(group, x):
        return torch.empty_like(x)
    if not uses_gloo(group):
        total = x.clone()
        dist.all_reduce(total, group=group.process_group)
        return total
    if x.numel() <= 4096:  # one message is cheaper than two
        return ordered_sum(all_gather_rows(x.reshape(1, -1), group)).to(x.dtype).view(x.shape)
    flat = x.reshape(-1)
    counts = even_counts(flat.numel(), group.size)
    return all_gather_rows(reduce_scatter_rows(flat, group, counts), group, counts).view(x.shape)


def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """Maximum over the group, the same on every rank.

    NaN on any rank gives NaN on all, on gloo. NCCL's maximum is `fmaxf`, which prefers numbers: there only a NaN on all
    ranks is one, and whoever looks for NaN looks at its own `x` and lets the ranks agree.
    """
    if group.size == 1:
        return x
    if _is_drawn(group, x):
        return torch.empty_like(x)
    if uses_gloo(group):
        return all_gather_rows(x.reshape(1, -1), group).amax(0).view(x.shape)
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group.process_group)
    return largest


def broadcast(x: Tensor, group: Group, source: int = 0) -> Tensor:
    """The tensor of group rank `source` on every rank (new tensor elsewhere)."""
    if group.size == 1:
        return x
    out = x.contiguous() if group.rank == source else torch.empty_like(x)
    dist.broadcast(out, src=group.ranks[source], group=group.process_group)
    return out


def barrier(group: Group) -> None:
    """Return when every rank of the group has called this."""
    if group.size > 1:
        dist.barrier(group=group.process_group)


def all_gather_object(value: Any, group: Group) -> list[Any]:
    """One picklable value of every rank, in rank order, on all. Not for the world: every rank receives them all."""
    if group.size == 1:
        return [value]
    values: list[Any] = [None] * group.size
    dist.all_gather_object(values, value, group=group.process_group)
    return values


def tell_first(text: str, group: Group, most: int = 20) -> dict[int, str]:
    """The texts of the first `most` ranks that have one (not ""), by rank, on all ranks.

    Costs a byte of each rank, and a broadcast of each such text: where all ranks have the same trouble, their texts do
    not all go to all.
    """
    return told_by(gather_bytes(text != "", group).nonzero().flatten().tolist()[:most], text, group)


def told_by(speakers: Sequence[int], value: Any, group: Group) -> dict[int, Any]:
    """The picklable value of each of these ranks, on all; `speakers` must be the same on all."""
    return {rank: broadcast_object(value, group, source=rank) for rank in speakers}


def gather_bytes(value: int, group: Group) -> Tensor:
    """A number of each rank, 0 to 255: uint8 `[size]` on the host."""
    device = torch.device("cpu") if group.size == 1 or uses_gloo(group) else torch.device("cuda")
    return all_gather_rows(torch.full((1,), value, dtype=torch.uint8, device=device), group).cpu()


def broadcast_object(value: Any, group: Group, source: int = 0) -> Any:
    """The picklable value of group rank `source`."""
    if group.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=group.ranks[source], group=group.process_group)
    return values[0]
