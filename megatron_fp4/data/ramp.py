"""Batch-size ramp: which samples step n takes, as arithmetic on consumed samples.

One idea: the global sample order does not know the batch size, so a ramp is only a list of (steps, size) levels.
`step_samples` is a closed form per level: trainer, prefetcher and audit ledger ask it the same question.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class BatchRampConfig:
    """Start at `start_samples`, add `increment_samples` at equal intervals over the first `ramp_samples`; 0 = off.

    As in Megatron's --rampup-batch-size: each level lasts ramp_samples / number of increments, rounded up to whole
    steps.
    """

    start_samples: int = 0
    increment_samples: int = 0
    ramp_samples: int = 0


def ramp_levels(ramp: BatchRampConfig, global_batch: int) -> list[tuple[int, int]]:
    """[(steps, samples per step), ...]; the last level, of `global_batch`, has steps = -1 (no end)."""
    if not ramp.ramp_samples:
        if ramp.start_samples or ramp.increment_samples:
            raise ValueError(f"the batch ramp {ramp} has ramp_samples=0, so its other fields have no effect")
        return [(-1, global_batch)]
    rise = global_batch - ramp.start_samples
    if ramp.start_samples < 1 or ramp.increment_samples < 1 or rise <= 0 or rise % ramp.increment_samples:
        raise ValueError(
            f"a batch ramp from {ramp.start_samples} to {global_batch} needs a whole number of increments of "
            f"{ramp.increment_samples}"
        )
    increments = rise // ramp.increment_samples
    sizes = [ramp.start_samples + i * ramp.increment_samples for i in range(increments)]
    return [*((-(-ramp.ramp_samples // (increments * size)), size) for size in sizes), (-1, global_batch)]


def step_samples(step: int, ramp: BatchRampConfig, global_batch: int) -> tuple[int, int]:
    """(first sample, number of samples) of 0-based step `step`: what `Loader.batch` takes."""
    first = 0
    for steps, size in ramp_levels(ramp, global_batch):
        if steps < 0 or step < steps:
            return first + step * size, size
        step, first = step - steps, first + steps * size
    raise AssertionError("the last level has no end")


def steps_from(step: int, ramp: BatchRampConfig, global_batch: int) -> Iterator[tuple[int, int]]:
    """(first sample, number of samples) of `step`, `step` + 1, ... without end: the prefetcher's list."""
    return (step_samples(n, ramp, global_batch) for n in itertools.count(step))
