"""What changes in the data on the way: the number of samples of a step, and the blend; each is said at its step."""

from __future__ import annotations

from megatron_fp4.train.run import Position, Run
from megatron_fp4.train.telemetry.console import Console


class DataPhaseLog:
    """Follows the steps of one attempt in order. A step whose samples lie in two data phases belongs to the later one.

    phase: number of the present entry of the data plan, from 0. num_samples: of the present step.
    """

    def __init__(self, run: Run, console: Console) -> None:
        self.phase = -1
        self.num_samples = 0
        self._run = run
        self._console = console

    def enter(self, position: Position) -> None:
        """The step after `position` begins."""
        config, plan = self._run.config, self._run.loader.plan
        step = position.step + 1
        num_samples = config.train.batch_at(position.samples)
        if self.num_samples and num_samples != self.num_samples:
            microbatches = config.train.gradient_accumulation(self._run.mesh.dp.size, num_samples)
            self._console.say(
                f"step {step}: {num_samples} samples a step from here on ({self.num_samples} before), {microbatches}"
                " microbatches per rank"
            )
        phase = plan.segment_of(plan.id_of(position.samples + num_samples - 1))
        if phase != self.phase and len(plan.segments) > 1:
            self._console.say(f"step {step}: {plan.segments[phase].describe(config.data.seq_length)}")
        self.phase = phase
        self.num_samples = num_samples

    def metrics(self) -> dict[str, float]:
        """Numbers of the present step: `batch_samples`, `data_phase`."""
        return {"batch_samples": float(self.num_samples), "data_phase": float(self.phase)}
