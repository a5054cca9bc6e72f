"""Which rank is the slowest in which phase of a step.

One idea: every so many steps each rank sends the seconds of its phases to all, and whoever is far above the median is
named. Ranks that work in step (one tensor-parallel group) are slow together: then the group is what to look at.
"""

from __future__ import annotations

import torch

from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.comm.mesh import Group
from megatron_fp4.train.phases import STEP_PHASES, Phases


def is_due(step: int, interval_steps: int, world: Group) -> bool:
    """Whether `step` is one that is compared; its phases are then timed exactly."""
    return world.size > 1 and interval_steps > 0 and step % interval_steps == 0


def straggler_metrics(phases: Phases, world: Group, device: torch.device) -> dict[str, float]:
    """Per phase of the last step: `straggler/<phase>/{rank,seconds,median}`. Collective; the same on every rank."""
    mine = torch.tensor([[phases.seconds(phase) for phase in STEP_PHASES]], dtype=torch.float64, device=device)
    seconds = all_gather_rows(mine, world).cpu()  # [ranks, phases]
    found: dict[str, float] = {}
    for number, phase in enumerate(STEP_PHASES):
        column = seconds[:, number]
        found[f"straggler/{phase}/rank"] = float(column.argmax())
        found[f"straggler/{phase}/seconds"] = float(column.max())
        found[f"straggler/{phase}/median"] = float(column.median())
    return found


def describe(metrics: dict[str, float]) -> str:
    """One line: the slowest rank of each phase."""
    parts = []
    for phase in STEP_PHASES:
        rank, seconds, median = (metrics[f"straggler/{phase}/{what}"] for what in ("rank", "seconds", "median"))
        parts.append(f"{phase} rank {rank:.0f} {seconds:.3f} s (median {median:.3f})")
    return "slowest ranks: " + ", ".join(parts)
