"""Which rank is the slowest in which phase of a step.

Every so many steps each rank sends the seconds of its phases to all, and the slowest of each phase is named. In phases
that are collectives slow means waiting, so there the rank that waits least is the one that is late. Ranks that meet
inside the forward pass (one tensor-parallel group, the stages of a pipeline) are slow together there.
"""

from __future__ import annotations

import torch

from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.comm.mesh import Group
from megatron_fp4.train.phases import STEP_PHASES, Phases

WAITS = ("reduce", "agree")
"""Phases that are nothing but collectives of all ranks."""


def is_due(step: int, interval_steps: int, world: Group) -> bool:
    """Whether `step` is one that is compared; its phases are then timed exactly."""
    return world.size > 1 and interval_steps > 0 and step % interval_steps == 0


def straggler_metrics(phases: Phases, world: Group, device: torch.device) -> dict[str, float]:
    """`straggler/<phase>/{rank,seconds,median}` of the last step, and who was waited for. Collective."""
    local_seconds = [phases.seconds(phase) for phase in STEP_PHASES]
    filled = [torch.full((), value, dtype=torch.float64, device=device) for value in local_seconds]  # not copied there
    seconds = all_gather_rows(torch.stack(filled)[None], world).cpu()  # [ranks, phases]
    metrics: dict[str, float] = {}
    for number, phase in enumerate(STEP_PHASES):
        column = seconds[:, number]
        metrics[f"straggler/{phase}/rank"] = float(column.argmax())
        metrics[f"straggler/{phase}/seconds"] = float(column.max())
        metrics[f"straggler/{phase}/median"] = float(column.median())
    waits = seconds[:, [STEP_PHASES.index(phase) for phase in WAITS]].sum(1)
    metrics["straggler/waited_for/rank"] = float(waits.argmin())
    metrics["straggler/waited_for/seconds"] = float(waits.max() - waits.min())
    return metrics


def describe(metrics: dict[str, float]) -> str:
    """The slowest rank of each phase, in one line. metrics: what `straggler_metrics` returned."""
    parts = []
    for phase in STEP_PHASES:
        rank, seconds, median = (metrics[f"straggler/{phase}/{what}"] for what in ("rank", "seconds", "median"))
        parts.append(f"{phase} rank {rank:.0f} {seconds:.3f} s (median {median:.3f})")
    late, seconds = (metrics[f"straggler/waited_for/{what}"] for what in ("rank", "seconds"))
    parts.append(f"the others waited for rank {late:.0f}, up to {seconds:.3f} s")
    return "slowest ranks: " + ", ".join(parts)
