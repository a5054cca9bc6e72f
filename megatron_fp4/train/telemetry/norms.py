"""Norms of parameters and gradients, each logical element counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.optim import Zero1Optimizer
from megatron_fp4.optim.clip import global_norm


def parameter_norm(optimizer: Zero1Optimizer, world: Group, device: torch.device) -> float:
    """Norm of the FP32 master weights of the whole model; a bias without a gradient is none. Collective."""
    return global_norm([shard.read("master") for shard in optimizer.updated_shards() if shard.writes], world, device)


def norms_by_tensor(optimizer: Zero1Optimizer) -> dict[str, dict[str, float]]:
    """{logical name: {"parameter", "gradient"}}, after `finish_grads` and before `step`. Collective; for reports."""
    parameters = _norms(optimizer, optimizer.updated_shards(), "master")
    gradients = _norms(optimizer, optimizer.grad_shards(), "grad")
    return {name: {"parameter": norm, "gradient": gradients[name]} for name, norm in parameters.items()}


def _norms(optimizer: Zero1Optimizer, shards: Iterable[Shard], kind: str) -> dict[str, float]:
    """The norm of each logical tensor, sorted by name, from the shards of all ranks. Collective."""
    written = [shard for shard in shards if shard.writes]
    squares = [shard.read(kind).double().square().sum() for shard in written]
    local_squares: dict[str, float] = {}
    for shard, square in zip(written, torch.stack(squares).tolist() if squares else [], strict=True):
        local_squares[shard.name] = local_squares.get(shard.name, 0.0) + square
    return {name: math.sqrt(square) for name, square in optimizer.sum_by_name(local_squares).items()}
