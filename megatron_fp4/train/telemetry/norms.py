"""Norms of parameters and gradients, each logical element counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import Group
from megatron_fp4.optim import StateShard, Zero1AdamW
from megatron_fp4.optim.clip import global_norm


def parameter_norm(optimizer: Zero1AdamW, world: Group, device: torch.device) -> float:
    """Norm of the FP32 master weights of the whole model. Collective."""
    return global_norm([shard.tensors["master"] for shard in optimizer.state_shards() if shard.writes], world, device)


def norms_by_tensor(stages: Sequence[nn.Module], optimizer: Zero1AdamW, world: Group) -> dict[str, dict[str, float]]:
    """{logical name: {"parameter", "gradient"}}, after `finish_grads` and before `step`. Collective; for reports."""
    mine: dict[str, tuple[float, float]] = {}
    for shard, grad in _owned_gradients(stages, optimizer):
        pair = mine.get(shard.name, (0.0, 0.0))
        squares = (_square_sum(shard.tensors["master"]), _square_sum(grad))
        mine[shard.name] = (pair[0] + squares[0], pair[1] + squares[1])
    found: dict[str, list[float]] = {}
    for of_rank in all_gather_object(mine, world):
        for name, squares in of_rank.items():
            total = found.setdefault(name, [0.0, 0.0])
            total[0] += squares[0]
            total[1] += squares[1]
    return {name: {"parameter": math.sqrt(p), "gradient": math.sqrt(g)} for name, (p, g) in sorted(found.items())}


def _owned_gradients(stages: Sequence[nn.Module], optimizer: Zero1AdamW) -> list[tuple[StateShard, Tensor]]:
    """The rows that this rank updates and counts, with their summed gradients."""
    places = {
        part.name: (parameter, part)
        for stage in stages
        for parameter in stage.parameters()
        for part in parameter.placement.segments  # type: ignore[attr-defined]
    }
    found = []
    for shard in optimizer.state_shards():
        if shard.writes:
            parameter, part = places[shard.name]
            first = part.start + shard.offset[0] - part.global_offset[0]
            found.append((shard, parameter.main_grad[first : first + shard.tensors["master"].shape[0]]))  # type: ignore[attr-defined]
    return found


def _square_sum(x: Tensor) -> float:
    return float(x.double().square().sum())
