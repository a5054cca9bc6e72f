"""The idle time of a pipeline: along the order of actions that torch really runs, and by the formula of the literature.

With stages of equal cost everything follows from the number of ranks p, microbatches m and model chunks per rank v.
Times are in units of one forward pass through all chunks of a rank; the backward takes two, one of them for the weight
gradients. Unequal stages add to this: see `imbalance`. torch's schedules are not always those of the papers, so the
planner reckons with what is counted along their own order (pipeline/order.py), and the formula stands beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.models.partition import block_costs, split_stages
from megatron_fp4.pipeline.order import Order, Timed, bubble, pipeline_order, simulate
from megatron_fp4.pipeline.schedules import stages_of_rank, stages_per_rank
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig

BUBBLES = {
    "gpipe": "(p - 1) / (m + p - 1)",
    "1f1b": "(p - 1) / (m + p - 1)",
    "interleaved_1f1b": "(p - 1) / (v m + p - 1)",
    "interleaved_zero_bubble": "(p - 1) / (3 v m + p - 1)",
    "zbv": "0 where m >= 2 p, else (p - 1) / (m + p - 1)",
    "dualpipev": "(p - 1) / (3 m + p - 1)",
}
"""Idle part of the time: arXiv 2104.04473 for 1F1B and interleaving, 2401.10241 for zero bubble and ZB-V (weight
gradients fill two thirds of the bubble, or all of it), DeepSeek's DualPipe notes for the last."""


@dataclass(frozen=True)
class PipelineShape:
    """schedule: a name of pipeline.schedules. num_ranks: p. num_microbatches: m, per step. num_chunks: v, per rank."""

    schedule: str
    num_ranks: int
    num_microbatches: int
    num_chunks: int = 1

    @property
    def bubble(self) -> float:
        """Part of the time in which a rank waits, by the formula of `BUBBLES`."""
        p = self.num_ranks
        m = self.num_microbatches
        v = self.num_chunks
        if p == 1 or (self.schedule == "zbv" and m >= 2 * p):
            return 0.0
        factor = {"interleaved_1f1b": v, "interleaved_zero_bubble": 3 * v, "dualpipev": 3}.get(self.schedule, 1)
        return (p - 1) / (factor * m + p - 1)


@dataclass(frozen=True)
class PipelineLayout:
    """Which pipeline rank holds which stages, and in which order it works through them.

    chunks: per rank, its stages by number. order: per rank, its computations in a step of a whole global batch.
    """

    shape: PipelineShape
    stages: list[StageRange]
    chunks: list[dict[int, StageRange]]
    order: Order

    @staticmethod
    def of(config: RunConfig, num_microbatches: int) -> PipelineLayout:
        """num_microbatches: per step and data-parallel rank."""
        parallel = config.parallel
        per_rank = stages_per_rank(parallel)
        stages = split_stages(config.model, parallel.pp * per_rank, parallel.stage_split)
        return PipelineLayout(
            PipelineShape(parallel.schedule, parallel.pp, num_microbatches, per_rank),
            stages,
            [{number: stages[number] for number in stages_of_rank(rank, parallel)} for rank in range(parallel.pp)],
            _order(_pipeline_alone(parallel), num_microbatches if parallel.pp > 1 else 1),  # else one after the other
        )

    def costs(self, model: ModelConfig) -> list[float]:
        """Multiply-adds per token of each pipeline rank."""
        costs = block_costs(model)
        return [sum(sum(costs[stage.first : stage.stop]) for stage in held.values()) for held in self.chunks]


def idle_part(parallel: ParallelConfig, num_microbatches: int) -> float:
    """Part of the time in which a pipeline rank waits, by the order of actions; 0 without a pipeline."""
    return _bubble(_pipeline_alone(parallel), num_microbatches) if parallel.pp > 1 else 0.0


def _pipeline_alone(parallel: ParallelConfig) -> ParallelConfig:
    """What an order depends on, so that layouts share it."""
    return ParallelConfig(pp=parallel.pp, schedule=parallel.schedule, virtual_stages=parallel.virtual_stages)


@functools.cache
def _order(parallel: ParallelConfig, num_microbatches: int) -> Order:
    return pipeline_order(parallel, num_microbatches)


@functools.cache
def _bubble(parallel: ParallelConfig, num_microbatches: int) -> float:
    return bubble(simulate(_order(parallel, num_microbatches)))


def imbalance(costs: Sequence[float]) -> float:
    """How much the heaviest stage slows the pipeline down: heaviest / mean, 1 for equal stages."""
    return max(costs) * len(costs) / sum(costs)


def ramp_section(checked: CheckedConfig) -> list[dict[str, Any]]:
    """One entry per size of a step; one in all without a batch-size ramp. bubble: idle part by the order of actions."""
    config, parallel = checked.config, checked.config.parallel
    entries = []
    for stage in config.stages():
        microbatches = config.train.gradient_accumulation(checked.dp, stage.size)
        entry = {"from_tokens": stage.first * config.data.seq_length, "samples": stage.size, "steps": stage.num_steps}
        idle = idle_part(parallel, microbatches)
        entries.append({**entry, "microbatches": microbatches, "bubble": idle})
    return entries


def pipeline_section(layout: PipelineLayout, costs: Sequence[float], idle: float, *, timeline: bool) -> dict[str, Any]:
    """Stages, their imbalance and idle time. timeline: also when each rank does what."""
    shape = layout.shape
    section: dict[str, Any] = {
        "schedule": shape.schedule if shape.num_ranks > 1 else "none",
        "blocks_per_stage": [stage.stop - stage.first for stage in layout.stages],
        "heaviest_rank_over_mean": imbalance(costs),
        "bubble": idle,
        "bubble_by_formula": shape.bubble,
        "bubble_formula": BUBBLES[shape.schedule],
    }
    if timeline:
        section["timeline"] = timeline_of(layout)
    return section


def timeline_of(layout: PipelineLayout) -> list[list[dict[str, Any]]]:
    """What each pipeline rank computes, and when: `pipeline.order.Timed` as plain values."""
    return [[_timeline_entry(timed) for timed in done] for done in simulate(layout.order)]


def _timeline_entry(timed: Timed) -> dict[str, Any]:
    work = timed.work
    return {
        "kind": work.kind,
        "stage": work.stage,
        "microbatch": work.microbatch,
        "units": work.units,
        "begin": timed.begin,
        "end": timed.end,
    }
