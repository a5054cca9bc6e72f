"""What a pipeline schedule costs by the formulas of the literature: idle time.

One idea: with stages of equal cost everything follows from the number of ranks p, microbatches m and model chunks per
rank v. Times are in units of one forward pass through all chunks of a rank; the backward takes two, one of them for the
weight gradients. Unequal stages add to this: see `imbalance`.

The schedules themselves are torch's (pipeline/schedules.py), and not always those of the papers: what the planner
reckons with is counted along their own order (pipeline/order.py), and the formula stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        p, m, v = self.num_ranks, self.num_microbatches, self.num_chunks
        if p == 1 or (self.schedule == "zbv" and m >= 2 * p):
            return 0.0
        factor = {"interleaved_1f1b": v, "interleaved_zero_bubble": 3 * v, "dualpipev": 3}.get(self.schedule, 1)
        return (p - 1) / (factor * m + p - 1)


def imbalance(costs: Sequence[float]) -> float:
    """How much the heaviest stage slows the pipeline down: heaviest / mean, 1 for equal stages."""
    return max(costs) * len(costs) / sum(costs)
