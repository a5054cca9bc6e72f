"""Batch-size ramp: how many samples a step takes, as arithmetic on the samples consumed before it.

The global sample order does not know the batch size, so the size of a step is a function of the number of
consumed samples, like the learning rate. A resume, a rollback or a batch size changed on the way needs no other state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_fp4.settings import Count


@dataclass(frozen=True)
class BatchRampConfig:
    """Smaller steps at the beginning: more at equal intervals of consumed samples, up to the global batch.

    As Megatron's --rampup-batch-size: a step that begins before an interval ends still has the interval's size.
    """

    start_samples: Count = 0
    """Samples of the first steps."""
    increment_samples: Count = 0
    """Samples that are added at each interval; a whole number of them leads to train.global_batch."""
    ramp_samples: Count = 0
    """Consumed samples from which a step takes the global batch; 0 = no ramp."""


class BatchStage(NamedTuple):
    """`num_steps` steps of `size` samples each, from sample `first` of the run on."""

    first: int
    size: int
    num_steps: int

    @property
    def end(self) -> int:
        return self.first + self.size * self.num_steps


def check_ramp(ramp: BatchRampConfig, global_batch: int) -> None:
    """Raise ValueError, with the numbers, for a ramp that has no effect or does not lead to `global_batch`."""
    start, increment = ramp.start_samples, ramp.increment_samples
    if not ramp.ramp_samples:
        if start or increment:
            raise ValueError(
                f"train.batch_ramp.start_samples = {start} and increment_samples = {increment} have no effect with"
                " ramp_samples = 0 (off); set train.batch_ramp.ramp_samples, or remove them"
            )
        return
    if min(start, increment, ramp.ramp_samples) < 1:
        raise ValueError(
            f"train.batch_ramp: start_samples = {start}, increment_samples = {increment} and ramp_samples ="
            f" {ramp.ramp_samples} must be positive (ramp_samples = 0 turns the ramp off)"
        )
    if start >= global_batch or (global_batch - start) % increment:
        raise ValueError(
            f"train.batch_ramp: {start} + a whole number of increments of {increment} must reach train.global_batch ="
            f" {global_batch}; change start_samples or increment_samples"
        )


def batch_sizes(ramp: BatchRampConfig, global_batch: int) -> list[int]:
    """Every size that a step may have, ascending; `global_batch` is the last."""
    if not ramp.ramp_samples:
        return [global_batch]
    return list(range(ramp.start_samples, global_batch + 1, ramp.increment_samples))


def batch_size(consumed: int, ramp: BatchRampConfig, global_batch: int) -> int:
    """Samples of the step that begins after `consumed` samples."""
    if consumed >= ramp.ramp_samples:
        return global_batch
    rise = (global_batch - ramp.start_samples) // ramp.increment_samples
    return ramp.start_samples + consumed * rise // ramp.ramp_samples * ramp.increment_samples


def batch_stages(first: int, end: int, ramp: BatchRampConfig, global_batch: int) -> list[BatchStage]:
    """The whole steps from sample `first` that fit before sample `end`, those of one size together."""
    stages: list[BatchStage] = []
    while True:
        size = batch_size(first, ramp, global_batch)
        steps = (end - first) // size
        if size < global_batch:
            rise = (global_batch - ramp.start_samples) // ramp.increment_samples
            number = (size - ramp.start_samples) // ramp.increment_samples + 1
            next_size_at = -(-number * ramp.ramp_samples // rise)
            steps = min(steps, -(-(next_size_at - first) // size))
        if steps < 1:
            return stages
        stages.append(BatchStage(first, size, steps))
        first = stages[-1].end
        if size == global_batch:
            return stages


def steps_from(consumed: int, ramp: BatchRampConfig, global_batch: int) -> Iterator[tuple[int, int]]:
    """(first sample, number of samples), what `Loader.batch` takes, of the steps after `consumed` samples, endless."""
    while True:
        size = batch_size(consumed, ramp, global_batch)
        yield consumed, size
        consumed += size
