"""Collectives with their gradients: the forward/backward pairs of tensor and sequence parallelism.

    gather_rows          forward all-gather rows       backward reduce-scatter rows
    scatter_sum_rows     forward reduce-scatter rows   backward all-gather rows
    scatter_rows         forward keep own rows         backward all-gather rows
    copy_to_group        forward identity              backward all-reduce
    reduce_from_group    forward all-reduce            backward identity

Rows are tokens. The names say what happens to the activation; the sequence-parallel pair is the first two lines.
No layout is known here beyond "rows, over this group"; how sums are made is in collectives.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm import collectives
from megatron_fp4.comm.mesh import Group


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, while_sending: Callable[[], None]) -> Tensor:
        ctx.group, ctx.while_sending = group, while_sending
        return collectives.all_gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = grads
        return collectives.reduce_scatter_rows(dy, ctx.group, while_sending=ctx.while_sending), None, None


class _ScatterSumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return collectives.reduce_scatter_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return collectives.all_gather_rows(dy, ctx.group), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.chunk(group.size)[group.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return collectives.all_gather_rows(dy, ctx.group), None


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return collectives.all_reduce_sum(dy, ctx.group), None


class _ReduceFromGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return collectives.all_reduce_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return dy, None


def gather_rows(x: Tensor, group: Group, while_sending: Callable[[], None] = lambda: None) -> Tensor:
    """`[T/n, ...] -> [T, ...]`; the gradients of all ranks are summed, each rank keeps its rows.

    while_sending: called in the backward pass while the gradients travel (never in a group of one rank).
    """
    return x if group.size == 1 else _GatherRows.apply(x, group, while_sending)


def scatter_sum_rows(x: Tensor, group: Group) -> Tensor:
    """Partial sums `[T, ...] -> [T/n, ...]`."""
    return x if group.size == 1 else _ScatterSumRows.apply(x, group)


def scatter_rows(x: Tensor, group: Group) -> Tensor:
    """Replicated `[T, ...] -> [T/n, ...]`, the own rows; the gradient is gathered back."""
    return x if group.size == 1 else _ScatterRows.apply(x, group)


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Replicated in, replicated out, where each rank then computes a part; gradients are summed."""
    return x if group.size == 1 else _CopyToGroup.apply(x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """Partial sums in, the replicated sum out."""
    return x if group.size == 1 else _ReduceFromGroup.apply(x, group)
