"""Acts on the spike ladder: skips, bundles, rollbacks, and a line in `spikes.jsonl` for everything that is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fp4.storage.append import AppendFile
from megatron_fp4.train.faults.bundle import BadStep, replay_command, write_bundle
from megatron_fp4.train.faults.rollback import RollbackRecord, roll_back
from megatron_fp4.train.faults.spikes import Action, SpikeLadder
from megatron_fp4.train.history.events import SPIKE_LOG
from megatron_fp4.train.run import Position, Run, TrainingDiverged
from megatron_fp4.train.telemetry.console import Console

SAVED = "spikes"
"""Key of the ladder's state in a checkpoint's small state."""


class RollBack(Exception):
    """Raised on all ranks in the step that rung 2 of the ladder ends. first_step: of the spikes in a row."""

    def __init__(self, first_step: int, last_step: int) -> None:
        super().__init__(f"loss spikes in steps {first_step} to {last_step}")
        self.first_step = first_step
        self.last_step = last_step


class SpikeGuard:
    """Asked once per step, between the agreement on the loss and the update; one for all attempts of a launch.

    meta: small state of the checkpoint that the run continues from. remembered: a rollback of which that checkpoint
    does not know yet.
    """

    def __init__(
        self, run: Run, console: Console, meta: dict[str, Any] | None = None, remembered: RollbackRecord | None = None
    ) -> None:
        self._run = run
        self._console = console
        saved = meta.get(SAVED) if meta else None
        self._ladder = SpikeLadder(run.config.train.spikes, saved)
        if remembered:
            self._ladder.rolled_back(saved or {}, remembered.rollbacks)

    def passes(self, loss: float, position: Position, rerun_step: Callable[[], object]) -> bool:
        """Whether the step after `position` may update. Raises RollBack or TrainingDiverged on all ranks. Collective.

        rerun_step: makes forward and backward of the step once more, to look at it.
        """
        step, state = position.step + 1, self._ladder.state
        judgement = self._ladder.judge(step, loss)
        if judgement.action is Action.go_on:
            return True
        bad = BadStep(step, position.samples, state.first_spike, rerun_step)
        directory = write_bundle(self._run, judgement, bad)
        self._log(step, judgement.action, loss=loss, mean=judgement.mean, deviation=judgement.deviation)
        text = f"step {step}: {judgement}: {judgement.action.value}; {replay_command(directory)}"
        self._console.event("spike", step, text)
        if judgement.action is Action.roll_back:
            raise RollBack(state.first_spike, step)
        if judgement.action is Action.abort:
            raise TrainingDiverged(
                f"step {step}: {judgement}, after {state.rollbacks} rollback(s); see {directory}. Start again with a"
                " lower optim.lr, or look at the samples and skip them (data.skip)"
            )
        return False

    def roll_back(self, spikes: RollBack, position: Position) -> Position:
        """Back to the newest checkpoint before the spikes; returns its position. position: before the last spike.

        Collective. Raises TrainingDiverged if there is no such checkpoint.
        """
        end_sample = position.samples + self._run.config.train.batch_at(position.samples)
        rollbacks = self._ladder.state.rollbacks + 1
        meta, skipped = roll_back(self._run, spikes.first_step, end_sample, rollbacks)
        self._ladder.rolled_back(meta.get(SAVED) or {}, rollbacks)
        ends = [skipped.start, skipped.stop]
        self._log(spikes.last_step, Action.roll_back, to_step=meta["step"], skipped_samples=ends)
        text = (
            f"rolled back from step {spikes.last_step} to checkpoint {meta['step']}; samples {skipped.start} to"
            f" {skipped.stop - 1} are skipped from here on"
        )
        self._console.event("rollback", spikes.last_step, text)
        return Position.from_meta(meta)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint stores: {SAVED: the ladder's state}, nothing where the ladder is off."""
        return {SAVED: self._ladder.state_dict()} if self._run.config.train.spikes.enabled else {}

    def _log(self, step: int, action: Action, **values: Any) -> None:
        if self._run.mesh.is_main:
            file = AppendFile(Path(self._run.config.train.run_dir) / SPIKE_LOG)
            file.add({"step": step, "action": action.name, **values})
            file.close()
