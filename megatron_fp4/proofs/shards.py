"""The model shards of a run, built from the configuration alone: for `preflight` and `crosscheck`.

One idea: a shard is built by the run's own constructors on a mesh that is only drawn, so what they refuse is found on
one process, and the local shapes of linears are those of real weights. On a GPU the weights are real memory; elsewhere
they are on the meta device, which has shapes and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import draw_mesh, rank_grid
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.precision.backends import Backend
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.trainable import draw_stages


@dataclass(frozen=True)
class Shard:
    """What one rank holds. shapes: local weight shape `[N, K]` of each linear. num_parameters: local elements."""

    rank: int
    shapes: dict[str, tuple[int, int]]
    num_parameters: int


def typical_ranks(parallel: ParallelConfig, world_size: int) -> list[int]:
    """Ranks whose shards differ: every pipeline rank's first and last tensor-parallel one (uneven vocabulary)."""
    grid = rank_grid(parallel, world_size)[:, 0, 0]
    return list(dict.fromkeys(grid[:, [0, -1]].flatten().tolist()))


def build_shards(
    checked: CheckedConfig, backend: Backend, device: torch.device, *, world_size: int, ranks: Sequence[int]
) -> list[Shard]:
    """Build the shard of each rank, one after the other. Raises whatever a constructor raises."""
    place = device if device.type == "cuda" else torch.device("meta")
    return [_build(checked, backend, place, world_size, rank) for rank in ranks]


def _build(checked: CheckedConfig, backend: Backend, place: torch.device, world_size: int, rank: int) -> Shard:
    config = checked.config
    stages = nn.ModuleList(draw_stages(config, backend, draw_mesh(config.parallel, world_size, rank), place))
    shapes = {name: (linear.weight.shape[0], linear.weight.shape[1]) for name, linear in linears_of(stages).items()}
    return Shard(rank, shapes, sum(parameter.numel() for parameter in stages.parameters()))
