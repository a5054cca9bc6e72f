"""The model shards of a run, built from the configuration alone, and the distinct local linears in them.

A shard is built by the run's own constructors on a mesh that is only drawn, so what they refuse is found on one
process, and the local shapes of linears are those of real weights. On a GPU the weights are real memory; elsewhere they
are on the meta device, which has shapes and no memory.

Not here: what a shard computes (gemms.py, operands.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import draw_mesh, rank_grid
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.selftest.linear_case import LinearCase
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import gemm_formats
from megatron_fp4.proofs.checks import CheckResult
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.trainable import draw_stages

MAX_CPU_TOKENS = 256
"""Rows of x on a CPU, where real kernels are not at stake and the weights' sizes are."""


@dataclass(frozen=True)
class ModelShard:
    """What one rank holds. shapes: local weight shape `[N, K]` of each linear. num_parameters: local elements."""

    rank: int
    shapes: dict[str, tuple[int, int]]
    num_parameters: int


@dataclass(frozen=True)
class LocalLinear:
    """A local weight shape `[N, K]` with a precision, and the linears that have both. tokens: rows of x."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    tokens: int
    precision: LinearPrecision

    def __str__(self) -> str:
        more = f" (and {len(self.names) - 1} more)" if len(self.names) > 1 else ""
        formats = "/".join(gemm_formats(self.precision))
        return f"{self.names[0]}{more}, weight {self.shape[0]}x{self.shape[1]}, {self.tokens} tokens, {formats}"

    @property
    def case(self) -> LinearCase:
        """What backends are compared on."""
        return LinearCase(self.names[0], self.shape, self.tokens, self.precision)


def typical_ranks(parallel: ParallelConfig, world_size: int) -> list[int]:
    """Ranks whose shards differ: every pipeline rank's first and last tensor-parallel one (uneven vocabulary)."""
    grid = rank_grid(parallel, world_size)[:, 0, 0]
    return list(dict.fromkeys(grid[:, [0, -1]].flatten().tolist()))


def build_shards(
    checked: CheckedConfig, backend: Backend, device: torch.device, *, world_size: int, ranks: Sequence[int]
) -> list[ModelShard]:
    """Build the shard of each rank, one after the other. Raises whatever a constructor raises."""
    where = device if device.type == "cuda" else torch.device("meta")
    return [_build_shard(checked, backend, where, world_size, rank) for rank in ranks]


def _build_shard(
    checked: CheckedConfig, backend: Backend, device: torch.device, world_size: int, rank: int
) -> ModelShard:
    config = checked.config
    stages = nn.ModuleList(draw_stages(config, backend, draw_mesh(config.parallel, world_size, rank), device))
    shapes = {name: (linear.weight.shape[0], linear.weight.shape[1]) for name, linear in linears_of(stages).items()}
    return ModelShard(rank, shapes, sum(parameter.numel() for parameter in stages.parameters()))


def distinct_linears(checked: CheckedConfig, shards: Sequence[ModelShard], device: torch.device) -> list[LocalLinear]:
    """Every pair of local shape and precision once, over all phases of the run and all shards, in the model's order."""
    config = checked.config
    tokens = config.train.micro_batch * config.data.seq_length // config.parallel.cp
    if device.type == "cpu":
        tokens = min(tokens, MAX_CPU_TOKENS)
    names_of: dict[tuple[tuple[int, int], LinearPrecision], list[str]] = {}
    for (_, table), shard in itertools.product(checked.plan.phases, shards):
        for name, shape in shard.shapes.items():
            names = names_of.setdefault((shape, table[name]), [])
            if name not in names:
                names.append(name)
    return [LocalLinear(tuple(names), shape, tokens, precision) for (shape, precision), names in names_of.items()]


def check_model(
    results: list[CheckResult],
    checked: CheckedConfig,
    backend: Backend,
    device: torch.device,
    *,
    world_size: int,
    ranks: Sequence[int],
) -> list[ModelShard]:
    """Append whether the shards of `ranks` can be built, and return them; none if one cannot."""
    try:
        shards = build_shards(checked, backend, device, world_size=world_size, ranks=ranks)
    except Exception as error:  # a constructor may fail in any way, out of memory included
        results.append(CheckResult("model", False, f"the shards cannot be built: {type(error).__name__}: {error}"))
        return []
    largest = max(shards, key=lambda shard: shard.num_parameters)
    where = "on this GPU" if device.type == "cuda" else "without memory (no GPU)"
    text = (
        f"{len(shards)} shard(s) of {world_size} rank(s) built {where}, the largest (rank {largest.rank}) with"
        f" {largest.num_parameters:,} parameters and {len(largest.shapes)} linears"
    )
    results.append(CheckResult("model", True, text))
    return shards
