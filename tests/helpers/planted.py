"""Bugs, planted into this rank for as long as a context lasts.

A test of a distributed feature shows with them what its tolerance would see; the parity check must find and name each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers import linear
from megatron_fp4.optim import clip, grad_buffer
from megatron_fp4.precision.backends import finite
from megatron_fp4.proofs.parity import Case, Record, run_cases

Bug = Callable[[], AbstractContextManager[None]]


def run_cases_with(bug: Bug) -> Callable[..., list[Record]]:
    """`run_cases` with a bug on every rank."""
    return partial(_run_cases_with, bug)


def _run_cases_with(bug: Bug, process: Process, cases: list[Case], parallel: ParallelConfig) -> list[Record]:
    with bug():
        return run_cases(process, cases, parallel)


def _local(x: Tensor, group: Group) -> Tensor:
    """In place of a collective: what is missing is the other ranks."""
    return x


@contextmanager
def local_amax() -> Iterator[None]:
    """Each rank scales its shard by its own largest magnitude."""
    with patch.object(finite, "all_reduce_max", _local):
        yield


@contextmanager
def summed_twice() -> Iterator[None]:
    """The sums after a row-parallel GEMM have every rank's part twice."""

    def twice(x: Tensor, group: Group) -> Tensor:
        return right(x, group) * 2.0

    right = linear.scatter_sum_rows
    with patch.object(linear, "scatter_sum_rows", twice):
        yield


@contextmanager
def rows_kept() -> Iterator[None]:
    """The backward of a sequence-parallel gather keeps this rank's rows instead of summing those of all."""

    def keeps(x: Tensor, group: Group, **options: Any) -> Tensor:
        whole = right(x, group, **options)
        parts = enumerate(whole.detach().chunk(group.size))
        return torch.cat([x if rank == group.rank else part for rank, part in parts])

    right = linear.gather_rows
    with patch.object(linear, "gather_rows", keeps):
        yield


@contextmanager
def doubled_tied_gradient() -> Iterator[None]:
    """The two copies of a tied embedding are summed once too often."""

    def doubled(bucket: Any, flat: Tensor, tp: Group) -> None:
        right(bucket, flat, tp)
        if bucket.kind.tied_group is not None:
            flat.mul_(2.0)

    right = grad_buffer._sum_replicas
    with patch.object(grad_buffer, "_sum_replicas", doubled):
        yield


@contextmanager
def unsummed_replicas() -> Iterator[None]:
    """Neither tied copies nor the partial gradients of norm weights under tensor parallelism are summed."""
    with patch.object(grad_buffer, "_sum_replicas", lambda bucket, flat, tp: None):
        yield


@contextmanager
def unsummed_grad_norm() -> Iterator[None]:
    """Each rank clips by the norm of what it holds."""
    with patch.object(clip, "all_reduce_sum", _local):
        yield
