"""Bugs, planted into the ranks of a layout: each must be found by the parity check, and named."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers import linear
from megatron_fp4.optim import clip, grad_buffer
from megatron_fp4.precision.backends import finite
from megatron_fp4.proofs.parity import Case, Record, run_cases


def _local(x: Tensor, group: Group) -> Tensor:
    """In place of a collective: what is missing is the other ranks."""
    return x


def missing_amax(process: Process, cases: list[Case], parallel: ParallelConfig) -> list[Record]:
    """Each rank scales its shard by its own largest magnitude."""
    finite.all_reduce_max = _local
    return run_cases(process, cases, parallel)


def doubled_tied_gradient(process: Process, cases: list[Case], parallel: ParallelConfig) -> list[Record]:
    right = grad_buffer._sum_replicas

    def doubled(bucket: Any, flat: Tensor, tp: Group) -> None:
        right(bucket, flat, tp)
        if bucket.kind.tied_group is not None:
            flat.mul_(2.0)

    grad_buffer._sum_replicas = doubled
    return run_cases(process, cases, parallel)


def unsummed_replicas(process: Process, cases: list[Case], parallel: ParallelConfig) -> list[Record]:
    """Neither tied copies nor the partial gradients of norm weights under tensor parallelism are summed."""
    grad_buffer._sum_replicas = lambda bucket, flat, tp: None
    return run_cases(process, cases, parallel)


def unsummed_gradient_norm(process: Process, cases: list[Case], parallel: ParallelConfig) -> list[Record]:
    """Each rank clips by the norm of what it holds."""
    clip.all_reduce_sum = _local
    return run_cases(process, cases, parallel)


def gather_without_gradient_sum(process: Process, cases: list[Case], parallel: ParallelConfig) -> list[Record]:
    """The backward of a sequence-parallel gather keeps this rank's rows instead of summing those of all."""

    def keeps(x: Tensor, group: Group, *while_sending: Any) -> Tensor:
        whole = right(x, group, *while_sending)
        parts = enumerate(whole.detach().chunk(group.size))
        return torch.cat([x if rank == group.rank else part for rank, part in parts])

    right = linear.gather_rows
    linear.gather_rows = keeps
    return run_cases(process, cases, parallel)
