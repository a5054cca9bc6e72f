"""Acts on the spike ladder: skips, bundles, rollbacks, and a line in `spikes.jsonl` for everything that is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fp4.storage.append import AppendFile
from megatron_fp4.train.build import Run
from megatron_fp4.train.faults.bundle import BadStep, replay_command, write_bundle
from megatron_fp4.train.faults.rollback import roll_back
from megatron_fp4.train.faults.spikes import Action, RollBack, SpikeLadder
from megatron_fp4.train.progress import Progress, TrainingDiverged
from megatron_fp4.train.telemetry.console import Console

SPIKE_LOG = "spikes.jsonl"
SAVED = "spikes"
"""Key of the ladder's state in a checkpoint's small state."""


class SpikeGuard:
    """Asked once per step, between the agreement on the loss and the update."""

    def __init__(self, run: Run, console: Console) -> None:
        self._run, self._console = run, console
        saved = run.resumed.get(SAVED) if run.resumed else None
        self._ladder = SpikeLadder(run.config.train.spikes, saved)
        if run.remembered:
            self._ladder.rolled_back(saved or {}, run.remembered.rollbacks)

    def passes(self, loss: float, done: Progress, again: Callable[[], object]) -> bool:
        """Whether the step after `done` may update. Raises RollBack or TrainingDiverged on all ranks. Collective.

        again: makes forward and backward of the step once more, to look at it.
        """
        step, state = done.step + 1, self._ladder.state
        judgement = self._ladder.judge(step, loss)
        if judgement.action is Action.go_on:
            return True
        bad = BadStep(step, done.consumed_samples, state.first_spike, again)
        directory = write_bundle(self._run, judgement, bad)
        self._log(step, judgement.action, loss=loss, mean=judgement.mean, deviation=judgement.deviation)
        self._console.say(f"step {step}: {judgement}: {judgement.action.value}; {replay_command(directory)}")
        if judgement.action is Action.roll_back:
            raise RollBack(state.first_spike, step)
        if judgement.action is Action.abort:
            raise TrainingDiverged(
                f"step {step}: {judgement}, after {state.rollbacks} rollback(s); see {directory}. Start again with a"
                " lower optim.lr, or look at the samples and skip them (data.skip)"
            )
        return False

    def roll_back(self, request: RollBack, done: Progress) -> Progress:
        """Back to a checkpoint; returns its progress. done: before the step that spiked last. Collective."""
        consumed = done.consumed_samples + self._run.config.train.batch_at(done.consumed_samples)
        rollbacks = self._ladder.state.rollbacks + 1
        meta, (first, end) = roll_back(self._run, request.first_step, consumed, rollbacks)
        self._ladder.rolled_back(meta.get(SAVED) or {}, rollbacks)
        self._log(request.last_step, Action.roll_back, to_step=meta["step"], skipped_samples=[first, end])
        self._console.say(
            f"rolled back from step {request.last_step} to checkpoint {meta['step']}; samples {first} to {end - 1} are"
            " skipped from here on"
        )
        return Progress.of(meta)

    def state_dict(self) -> dict[str, Any]:
        return {SAVED: self._ladder.state_dict()} if self._run.config.train.spikes.enabled else {}

    def _log(self, step: int, action: Action, **values: Any) -> None:
        if self._run.mesh.is_main:
            file = AppendFile(Path(self._run.config.train.run_dir) / SPIKE_LOG)
            file.add({"step": step, "action": action.name, **values})
            file.close()
