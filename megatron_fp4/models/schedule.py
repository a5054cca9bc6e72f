"""What a pipeline schedule costs, by formula: idle time and activations in flight.

One idea: with stages of equal cost everything follows from the number of ranks p, microbatches m and model chunks per
rank v. Times are in units of one forward pass through all chunks of a rank; the backward takes two, one of them for the
weight gradients. Unequal stages add to this: see `imbalance`.

These are estimates for planning; the schedules themselves are torch's (pipeline/engine.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SCHEDULES = ("gpipe", "1f1b", "interleaved1f1b", "interleavedzerobubble", "zbvzerobubble", "dualpipev")


@dataclass(frozen=True)
class PipelineShape:
    """schedule: one of SCHEDULES in any spelling (`Interleaved1F1B`, `interleaved_1f1b`); ValueError for others.

    num_ranks: pipeline-parallel size p. num_microbatches: m. num_chunks: model chunks per rank, v.
    """

    schedule: str
    num_ranks: int
    num_microbatches: int
    num_chunks: int = 1

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"parallel.schedule = {self.schedule!r} is not known here; use one of {SCHEDULES}")

    @property
    def kind(self) -> str:
        return self.schedule.lower().replace("_", "").replace("-", "")

    @property
    def bubble_formula(self) -> str:
        return {
            "gpipe": "(p - 1) / (m + p - 1)",
            "1f1b": "(p - 1) / (m + p - 1)",
            "interleaved1f1b": "(p - 1) / (v m + p - 1)",
            "interleavedzerobubble": "(p - 1) / (3 v m + p - 1)",
            "zbvzerobubble": "0 where m >= 2 p, else (p - 1) / (m + p - 1)",
            "dualpipev": "(p - 1) / (3 m + p - 1)",
        }[self.kind]

    @property
    def bubble(self) -> float:
        """Part of the time in which a rank waits (arXiv 2104.04473 for 1F1B and interleaving; 2401.10241 zero bubble;
        DeepSeek's DualPipe notes)."""
        p, m, v = self.num_ranks, self.num_microbatches, self.num_chunks
        if p == 1 or (self.kind == "zbvzerobubble" and m >= 2 * p):
            return 0.0
        work = {"interleaved1f1b": v * m, "interleavedzerobubble": 3 * v * m, "dualpipev": 3 * m}.get(self.kind, m)
        return (p - 1) / (work + p - 1)

    def in_flight(self, rank: int) -> float:
        """Microbatches whose activations a rank of the pipeline holds at once, each over all its chunks."""
        p, m, v = self.num_ranks, self.num_microbatches, self.num_chunks
        if self.kind == "gpipe":
            return float(m)
        if self.kind == "1f1b" or p == 1:
            return float(min(m, p - rank))
        if self.kind in ("zbvzerobubble", "dualpipev"):
            return float(min(m, p + (self.kind == "dualpipev")))
        warmup = 2 * (p - rank - 1) + (v - 1) * p  # chunks that enter before the first leaves
        return min(m * v, warmup + 1) / v


def imbalance(costs: Sequence[float]) -> float:
    """How much the heaviest stage slows the pipeline down: heaviest / mean, 1 for equal stages."""
    return max(costs) * len(costs) / sum(costs)
