"""The training loop: it only sequences.

    fetch the samples -> train_step -> log -> evaluate, save

`fit` makes attempts until one comes to the end; an attempt is everything that counts steps, so that a rollback is a new
one, which remembers nothing of the steps that it undoes.

Not here: the step itself (step.py), and what surrounds a loop in a job (job.py).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_fp4.data.prefetch import Prefetched, Prefetcher
from megatron_fp4.data.ramp import steps_from
from megatron_fp4.train.build import Start
from megatron_fp4.train.evaluation.sets import EvaluationStopped
from megatron_fp4.train.faults.guard import RollBack, SpikeGuard
from megatron_fp4.train.faults.signals import EXIT_OK, EXIT_REQUEUE, StopRequest
from megatron_fp4.train.resume.saving import Saves, meta_of
from megatron_fp4.train.run import Position, Run, TrainingDiverged
from megatron_fp4.train.step import train_step
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.step_log import StepLog


@dataclass(frozen=True)
class Outputs:
    """What connects the loop with the world; it outlives an attempt.

    metrics: sinks on the main rank, none elsewhere. wandb_id: stored in every checkpoint, for a resume.
    """

    metrics: Metrics
    console: Console
    stop: StopRequest
    guard: SpikeGuard
    wandb_id: str


def fit(run: Run, start: Start, outputs: Outputs) -> int:
    """Train; returns the exit code (0 done, EXIT_REQUEUE stopped on request), with the last state saved.

    Raises SaveFailed if it could not be, TrainingDiverged. Collective over the world.
    """
    position = start.position
    if run.store.mirror:
        run.store.mirror.start()
    while True:
        try:
            with Attempt(run, position, outputs) as attempt:
                return attempt.run_to_end()
        except RollBack as spikes:
            run.phases.enter("save")
            position = outputs.guard.roll_back(spikes, attempt.position)
            outputs.metrics.rewind(position.step)


class Attempt:
    """From a position to the end of the run, a requested stop, or a rollback. Use it in a `with`.

    position: behind the newest step.
    """

    def __init__(self, run: Run, position: Position, outputs: Outputs) -> None:
        self.run = run
        self.position = position
        self.outputs = outputs
        train = run.config.train
        self._last_step = run.config.last_step(position.step, position.samples)
        steps = steps_from(position.samples, train.batch_ramp, train.global_batch)
        steps_to_come = itertools.islice(steps, self._last_step - position.step)
        self._log = StepLog(run, position, outputs.metrics, outputs.console)
        self._saves = Saves(run, position, outputs.metrics, outputs.console)
        self._first_is_read = False
        self._score: float | None = None
        """Loss on the first held-out set at `position`, if it was evaluated there."""
        depth = run.config.data.prefetch_batches
        self._batches = Prefetcher(run.loader, steps_to_come, depth=depth, while_waiting=self._name_the_wait)

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._batches.close()
        self._log.close()

    def _name_the_wait(self) -> None:
        """An index may take an hour, a batch may not."""
        if self.run.loader.waits_for_index and self.run.phases.current.name == "data":
            self.run.phases.enter("index")

    def run_to_end(self) -> int:
        """See `fit`. Raises RollBack on all ranks."""
        run, console = self.run, self.outputs.console
        stopped = False
        console.start(self.position.step, self._last_step)
        while self.position.step < self._last_step and not stopped:
            stopped = self._step() or self._after_step()
        run.phases.enter("save")
        self._saves.finish(self.position, self._meta, self._score)
        step, reason = self.position.step, self.outputs.stop.reason or "another rank"
        if not stopped:
            console.events.add("finish", step, f"step {step}, the last one, is made and saved")
            return EXIT_OK
        console.event("stop", step, f"stopped on request ({reason}) after step {step}")
        if self._evaluation_is_due():
            self._evaluate_after_stop()
        return EXIT_REQUEUE

    def _step(self) -> bool:
        """Make and tell one step; returns whether any rank asked to stop. Raises RollBack, TrainingDiverged."""
        run, outputs = self.run, self.outputs
        first_sample = self.position.samples
        self._log.begin(self.position)
        batch = self._next_batch().batch
        result = train_step(run, batch, self.position, outputs.guard, outputs.stop.requested)
        self.position = result.position
        self._score = None
        self._log.end(first_sample, result)
        self._check_skipped()
        return result.stop

    def _next_batch(self) -> Prefetched:
        """Where a step needs the index of an epoch that no step of this attempt has needed, all ranks wait for the
        slowest node: in the step's collectives they would not wait so long. Raises RankFailed on all ranks."""
        run = self.run
        run.phases.enter("data")
        num_samples = run.config.train.batch_at(self.position.samples)
        if self._first_is_read and not run.loader.begins_epoch(self.position.samples, num_samples):
            return next(self._batches)
        with run.waiting_for_index():
            batch = next(self._batches)
            run.phases.enter("index")
        self._first_is_read = True
        return batch

    def _check_skipped(self) -> None:
        """All ranks come to the same count."""
        skipped = self.position.skipped_in_a_row
        if skipped >= self.run.config.train.max_skipped_steps:
            raise TrainingDiverged(
                f"{skipped} steps in a row had gradients that were not finite, or no target token, up to step"
                f" {self.position.step}; start again from the last checkpoint with a lower optim.lr, other data"
                " (data.skip) or a higher precision"
            )

    def _after_step(self) -> bool:
        """Evaluate and save where it is due; tell what became of earlier saves.

        Returns whether a request to stop has ended an evaluation: then the state is to be saved first of all.
        """
        if self._evaluation_is_due():
            try:
                self._evaluate(self.outputs.stop.requested)
            except EvaluationStopped:
                return True
        interval = self.run.config.train.save_interval_steps
        if interval and self.position.step % interval == 0:
            self.run.phases.enter("save")
            self._saves.save(self.position, self._meta, self._score)
        self._saves.poll()
        return False

    def _evaluation_is_due(self) -> bool:
        config, step = self.run.config, self.position.step
        interval = config.train.eval_interval_steps
        return bool(interval) and (step % interval == 0 or not config.stages(self.position.samples))

    def _evaluate_after_stop(self) -> None:
        """The end of a run is evaluated now or never; before it, whoever asked to stop may not wait so long."""
        if self.position.step == self._last_step:
            self._evaluate(lambda: False)
        else:
            self.outputs.console.say(f"step {self.position.step}: not evaluated, because of the request to stop")

    def _evaluate(self, stop: Callable[[], bool]) -> None:
        """stop: whether this rank is asked to stop. Raises EvaluationStopped on all ranks soon after one was."""
        run, step = self.run, self.position.step
        run.phases.enter("evaluate")
        table = run.plan.evaluation_table(self._log.precision_phase)
        began = time.perf_counter()
        for finding in run.examiner.examine(table, run.phases.beat, stop):
            if self._score is None:
                self._score = finding.loss
            self.outputs.metrics.write(step, finding.metrics)
            self.outputs.console.say(f"step {step}: {finding.text} ({time.perf_counter() - began:.1f} s)")
            began = time.perf_counter()

    def _meta(self) -> dict[str, Any]:
        """All that a resume needs beside the tensors."""
        meta = meta_of(self.run, self.position, self._log.precision_phase, self.outputs.wandb_id)
        return {**meta, **self.outputs.guard.state_dict()}
