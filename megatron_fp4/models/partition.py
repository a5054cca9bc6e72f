"""How the blocks of a model are divided into pipeline stages.

Embedding and head weigh like the blocks they cost, and the heaviest stage decides the pace, so the split is the
contiguous one with the smallest heaviest stage. An explicit list overrides it.
"""

from __future__ import annotations

import functools

from megatron_fp4.models.block import block_linears, last_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import StageRange


def block_costs(config: ModelConfig) -> list[float]:
    """Multiply-adds per token of each block's linears; head and multi-token prediction are added to the last block (the
    embedding is free)."""
    costs = [
        float(sum(info.active_numel for info in block_linears(index, config))) for index in range(len(config.blocks))
    ]
    costs[-1] += float(sum(info.active_numel * info.uses for info in last_linears(config)))
    return costs


def split_stages(config: ModelConfig, num_stages: int, split: str = "cost") -> list[StageRange]:
    """Stage ranges in order. split: `cost`, or block counts such as `9,8,8,7`.

    Raises ValueError if there are fewer blocks than stages or the list does not add up.
    """
    total = len(config.blocks)
    if num_stages > total:
        raise ValueError(
            f"{num_stages} pipeline stages (pp * virtual stages) need at least as many blocks, got {total}"
        )
    cheapest = split == "cost"
    counts = list(_cheapest_counts(tuple(block_costs(config)), num_stages)) if cheapest else _listed_counts(split)
    if len(counts) != num_stages or sum(counts) != total or min(counts) < 1:
        raise ValueError(
            f"parallel.stage_split = {split!r} names {len(counts)} stages with {sum(counts)} blocks; expected"
            f" {num_stages} stages (pp * virtual stages) with {total} blocks, at least one each"
        )
    ranges, first = [], 0
    for count in counts:
        ranges.append(StageRange(first, first + count, total))
        first += count
    return ranges


def _listed_counts(split: str) -> list[int]:
    try:
        return [int(part) for part in split.split(",")]
    except ValueError:
        raise ValueError(f"parallel.stage_split = {split!r}; use 'cost' or block counts such as '9,8,8,7'") from None


@functools.cache
def _cheapest_counts(costs: tuple[float, ...], num_stages: int) -> tuple[int, ...]:
    """Contiguous split with the smallest heaviest part (dynamic programme over prefixes)."""
    prefix = [0.0]
    for cost in costs:
        prefix.append(prefix[-1] + cost)
    total = len(costs)
    best = [[float("inf")] * (total + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (total + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for stages in range(1, num_stages + 1):
        for stop in range(stages, total + 1):
            for start in range(stages - 1, stop):
                heaviest = max(best[stages - 1][start], prefix[stop] - prefix[start])
                if heaviest < best[stages][stop]:
                    best[stages][stop], cut[stages][stop] = heaviest, start
    counts, stop = [], total
    for stages in range(num_stages, 0, -1):
        counts.append(stop - cut[stages][stop])
        stop = cut[stages][stop]
    return tuple(counts[::-1])
