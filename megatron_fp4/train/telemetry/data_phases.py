"""What changes in the data on the way: the number of samples of a step, and the blend; each is said at its step."""

from __future__ import annotations

from megatron_fp4.train.build import Run
from megatron_fp4.train.progress import Progress
from megatron_fp4.train.telemetry.console import Console


class DataChanges:
    """Of the steps from here on, in order. A step whose samples lie in two data phases belongs to the later one."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        self._number, self._samples = -1, 0

    def enter(self, done: Progress, num_samples: int) -> None:
        """The step after `done` takes `num_samples` samples."""
        config, plan, step = self._run.config, self._run.loader.plan, done.step + 1
        if self._samples and num_samples != self._samples:
            microbatches = config.train.gradient_accumulation(self._run.mesh.dp.size, num_samples)
            self._console.say(
                f"step {step}: {num_samples} samples a step from here on ({self._samples} before), {microbatches}"
                " microbatches per rank"
            )
        number = plan.segment_of(plan.id_of(done.consumed_samples + num_samples - 1))
        if number != self._number and len(plan.segments) > 1:
            self._console.say(f"step {step}: {plan.segments[number].describe(config.data.seq_length)}")
        self._number, self._samples = number, num_samples

    def metrics(self) -> dict[str, float]:
        """data_phase: number of the present entry of the plan, from 0."""
        return {"batch_samples": float(self._samples), "data_phase": float(self._number)}
