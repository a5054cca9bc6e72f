"""The training loop: it only sequences.

    take the samples -> forward and backward -> sum gradients -> agree -> step -> log -> evaluate, save

One idea: everything that a step depends on (learning rate, precision, samples, noise) is a function of the number of
consumed samples, so the state of the loop is two integers and a resume needs nothing else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.data.batch import Batch
from megatron_fp4.data.ledger import LedgerWriter, step_hash
from megatron_fp4.data.prefetch import Prefetcher
from megatron_fp4.data.ramp import steps_from
from megatron_fp4.optim import StepReport, learning_rate
from megatron_fp4.precision import table as precision_table
from megatron_fp4.precision.backends import NonFiniteEvent
from megatron_fp4.train.agreement import StepMessage, exchange
from megatron_fp4.train.build import Run
from megatron_fp4.train.evaluate import assign, evaluate
from megatron_fp4.train.faults.guard import SpikeGuard
from megatron_fp4.train.faults.signals import EXIT_OK, EXIT_REQUEUE, StopRequest
from megatron_fp4.train.faults.spikes import RollBack
from megatron_fp4.train.inputs import make_inputs
from megatron_fp4.train.progress import Progress, TrainingDiverged, what_was_not_finite
from megatron_fp4.train.resume.saving import Saves, meta_of
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.data_phases import DataChanges
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.norms import parameter_norm
from megatron_fp4.train.telemetry.stragglers import describe, is_due, straggler_metrics
from megatron_fp4.train.telemetry.throughput import Throughput

__all__ = ["Trainer", "TrainingDiverged"]


class Trainer:
    """Drives a `Run` to its last step or to a requested stop. metrics: sinks of the main rank (none elsewhere).

    The main rank writes the data ledger in the run directory.
    """

    def __init__(self, run: Run, metrics: Metrics, console: Console, stop: StopRequest, wandb_id: str) -> None:
        self.run, self.metrics, self.console, self._stop, self._wandb_id = run, metrics, console, stop, wandb_id
        self.config = run.config
        self.progress = Progress.of(run.resumed) if run.resumed else Progress()
        self.phases = run.phases
        self._precision_phase = -1
        self._evaluated: tuple[int, float] | None = None  # step, loss on the first evaluation set
        self._saves = Saves(run, metrics, console)
        self._guard = SpikeGuard(run, console)
        self._changes = DataChanges(run, console)
        self._throughput = Throughput(self.config, run.mesh.world.size, run.device)
        self._ledger = self._open_ledger()

    def _open_ledger(self) -> LedgerWriter | None:
        """From the next step on; what an earlier attempt wrote about it is void."""
        step, samples = self.progress.step + 1, self.progress.consumed_samples
        if not self.run.mesh.is_main:
            return None
        return LedgerWriter(self.config.train.run_dir, self.run.loader, step=step, first_sample=samples)

    def fit(self) -> int:
        """Train; returns the exit code (0 done, EXIT_REQUEUE stopped on request), with the last state saved.

        Raises SaveFailed if it could not be, TrainingDiverged.
        """
        self.console.say(self._throughput.describe())
        stop = False
        while self.progress.step < self._last_step and not stop:
            try:
                stop = self._train()
            except RollBack as request:
                self._roll_back(request)
        self.phases.enter("save")
        self._saves.finish(self.progress, self._meta, self._score())
        if self._ledger:
            self._ledger.close()
        if stop:
            reason = self._stop.reason or "another rank"
            self.console.say(f"stopped on request ({reason}) after step {self.progress.step}")
        return EXIT_REQUEUE if stop else EXIT_OK

    def _train(self) -> bool:
        """Steps to the end, or until a rank asks to stop (then True)."""
        train, done, last_step = self.config.train, self.progress, self._last_step
        self.console.start(done.step, last_step)
        num_steps = last_step - done.step
        to_come = itertools.islice(steps_from(done.consumed_samples, train.batch_ramp, train.global_batch), num_steps)
        with Prefetcher(self.run.loader, to_come, depth=self.config.data.prefetch_batches) as batches:
            for _ in range(num_steps):
                step = self.progress.step + 1
                measured = is_due(step, train.straggler_interval_steps, self.run.mesh.world)
                self.phases.begin(step, exact=measured)
                self.phases.enter("data")
                made = next(batches)
                stop = self._step(made.batch, made.num_samples)
                if measured:
                    self._report_stragglers()
                self._after_step()
                if stop:
                    return True
        return False

    # -- one step -------------------------------------------------------------------------------------------------

    @property
    def _last_step(self) -> int:
        return self.config.last_step(self.progress.step, self.progress.consumed_samples)

    def _step(self, batch: Batch, num_samples: int) -> bool:
        """One optimizer step; returns whether any rank asked to stop. Raises RollBack on all ranks.

        batch: this rank's rows of the step's `num_samples` samples.
        """
        run, config, enter = self.run, self.config, self.phases.enter
        enter("forward_backward")
        self._enter_precision_phase()
        self._changes.enter(self.progress, num_samples)
        run.clock.step = self.progress.step
        inputs = make_inputs(batch, run.mesh.cp, run.device)
        run.optimizer.zero_grad()
        microbatches = inputs.split(config.train.micro_batch)
        scale, table = 1.0 / self._num_targets(batch), run.plan.table(self._precision_phase)
        with run.observers.watching(self.progress.step + 1, table, run.engine.stages, len(microbatches)):
            loss = run.engine.train(microbatches, scale, run.optimizer.begin_last_microbatch)
        enter("reduce")
        events = run.watch.take() if run.watch else []
        if events:
            run.optimizer.spoil_grads()
        norm = run.optimizer.finish_grads()
        enter("agree")
        counts = run.mesh.tp.rank == 0 and run.engine.reports_loss
        message = StepMessage(loss.item() if counts else 0.0, bool(self._stop.reason), step_hash(batch))
        agreed = exchange(message, run.mesh, run.device)
        enter("update")
        report = self._update(
            agreed.loss, norm, num_samples, lambda: run.engine.train(microbatches, scale, lambda: None)
        )
        enter("log")
        if self._ledger:
            done = self.progress
            self._ledger.add(done.step + 1, done.consumed_samples, num_samples, agreed.tokens_hash)
        self.progress.step += 1
        self.progress.consumed_samples += num_samples
        self._count(report, events, batch)
        self._log(agreed.loss, report, num_samples)
        return agreed.stop

    def _update(self, loss: float, norm: float, num_samples: int, again: Callable[[], Tensor]) -> StepReport:
        """The optimizer step, unless the loss is a spike: then no state changes. again: see `SpikeGuard.passes`."""
        optimizer, config = self.run.optimizer, self.config
        tokens = (self.progress.consumed_samples + num_samples) * config.data.seq_length
        lr = learning_rate(config.optim, tokens, config.run_tokens)
        if not self._guard.passes(loss, self.progress, again):
            return StepReport(lr, norm, 0.0, skipped=True)
        return optimizer.step(norm, lr=lr, max_norm=config.optim.clip_norm)

    def _num_targets(self, batch: Batch) -> float:
        """Target tokens of the whole global batch."""
        count = batch.loss_mask.sum(dtype=torch.float64).view(1).to(self.run.device)
        return max(1.0, all_reduce_sum(count, self.run.mesh.dp).item())

    def _enter_precision_phase(self) -> None:
        """Assign the precision of this step; a change is logged as the difference of two tables."""
        plan, old = self.run.plan, self._precision_phase
        phase = plan.phase_at(self.progress.consumed_samples * self.config.data.seq_length)
        if phase == old:
            return
        if old >= 0:
            changes = precision_table.difference(plan.table(old).texts(), plan.table(phase).texts())
            self.console.say("\n".join([f"step {self.progress.step + 1}: precision changes", *changes]))
        for stage in self.run.engine.stages:
            assign(stage, plan.table(phase))
        self._precision_phase = phase

    def _count(self, report: StepReport, events: list[NonFiniteEvent], batch: Batch) -> None:
        """Say what was not finite, and count. All ranks come to the same count."""
        if report.nonfinite:
            what = what_was_not_finite(report, events, batch, self.run.mesh.world)
            self.console.say(f"step {self.progress.step}: update skipped on all ranks, NaN or Inf in {what}")
        self.progress.count(report, self.config.train.max_skipped_steps)

    # -- between steps --------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        train, step = self.config.train, self.progress.step
        self.run.observers.write_statistics(step, self.metrics)
        ended = not self.config.stages(self.progress.consumed_samples)
        if train.eval_interval_steps and (step % train.eval_interval_steps == 0 or ended):
            self._evaluate()
        if train.save_interval_steps and step % train.save_interval_steps == 0:
            self._save()
        self._saves.poll()

    def _evaluate(self) -> None:
        run = self.run
        self.phases.enter("evaluate")
        for loader in run.evaluations:
            began = time.perf_counter()
            table = run.plan.evaluation_table(self._precision_phase)
            loss = evaluate(run.engine, loader, table, run.mesh, run.device, self.phases.beat)
            if loader is run.evaluations[0]:
                self._evaluated = self.progress.step, loss
            self.metrics.write(self.progress.step, {f"eval/{loader.name}/loss": loss})
            seconds = time.perf_counter() - began
            self.console.say(f"step {self.progress.step}: {loader.name} loss {loss:.4f} ({seconds:.1f} s)")

    def _report_stragglers(self) -> None:
        found = straggler_metrics(self.phases, self.run.mesh.world, self.run.device)
        self.metrics.write(self.progress.step, found)
        self.console.say(f"step {self.progress.step}: {describe(found)}")

    def _log(self, loss: float, report: StepReport, num_samples: int) -> None:
        run, table = self.run, self.run.plan.table(self._precision_phase)
        values = {"loss": loss, "grad_norm": report.grad_norm, "lr": report.lr, "skipped": float(report.skipped)}
        values |= self.progress.metrics(self.config.data.seq_length) | self._changes.metrics()
        values |= self._throughput.metrics(self.phases, table, num_samples * self.config.data.seq_length)
        if self.progress.step % max(1, self.config.train.log_interval_steps) == 0:
            values["param_norm"] = parameter_norm(run.optimizer, run.mesh.world, run.device)
        self.metrics.write(self.progress.step, values)
        self.console.step(self.progress.step, values)

    def _save(self) -> None:
        self.phases.enter("save")
        self._saves.save(self.progress, self._meta, self._score())

    def _score(self) -> float | None:
        step, loss = self._evaluated or (-1, None)
        return loss if step == self.progress.step else None

    def _meta(self) -> dict[str, Any]:
        meta = meta_of(self.run, self.progress, self._precision_phase, self._wandb_id)
        return {**meta, **self._guard.state_dict()}

    def _roll_back(self, request: RollBack) -> None:
        """Everything that counts steps goes back to the checkpoint's."""
        self.phases.enter("save")
        self.progress = self._guard.roll_back(request, self.progress)
        self._saves.last_step, self._precision_phase = self.progress.step, -1
        self._changes = DataChanges(self.run, self.console)
        self.metrics.rewind(self.progress.step)
        if self._ledger:
            self._ledger.close()
        self._ledger = self._open_ledger()
