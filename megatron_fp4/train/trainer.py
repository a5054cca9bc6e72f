"""The training loop: it only sequences.

    take the samples -> forward and backward -> sum gradients -> step -> agree -> log -> evaluate, save

One idea: everything that a step depends on (learning rate, precision, samples, noise) is a function of the number of
consumed samples, so the state of the loop is two integers and a resume needs nothing else.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import Any

import torch

import megatron_fp4
from megatron_fp4.checkpoint import SaveReport
from megatron_fp4.comm.collectives import all_gather_object, all_reduce_sum
from megatron_fp4.data.batch import Batch
from megatron_fp4.data.ledger import LedgerWriter, step_hash
from megatron_fp4.data.prefetch import Prefetcher
from megatron_fp4.optim import StepReport, learning_rate
from megatron_fp4.precision import table as precision_table
from megatron_fp4.precision.backends import NonFiniteEvent
from megatron_fp4.train.build import Run
from megatron_fp4.train.console import Console
from megatron_fp4.train.evaluate import assign, evaluate
from megatron_fp4.train.exchange import StepMessage, exchange
from megatron_fp4.train.inputs import make_inputs
from megatron_fp4.train.metrics import Metrics
from megatron_fp4.train.plain import plain
from megatron_fp4.train.signals import EXIT_OK, EXIT_REQUEUE, StopRequest


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had gradients that were not finite."""


@dataclass
class Progress:
    """How far a run is. skipped: steps in a row whose update was skipped."""

    step: int = 0
    consumed_samples: int = 0
    skipped: int = 0


class Trainer:
    """Drives a `Run` to its last step or to a requested stop. metrics: sinks of the main rank (none elsewhere).

    The main rank writes the data ledger in the run directory.
    """

    def __init__(self, run: Run, metrics: Metrics, console: Console, stop: StopRequest, wandb_id: str) -> None:
        self.run, self.metrics, self.console, self._stop, self._wandb_id = run, metrics, console, stop, wandb_id
        self.config = run.config
        resumed = run.resumed
        self.progress = (
            Progress(resumed["step"], resumed["consumed_samples"], resumed["skipped"]) if resumed else Progress()
        )
        self._phase = -1
        self._saved_step = self.progress.step if resumed else -1
        self._ledger = (
            LedgerWriter(
                self.config.train.run_dir,
                run.loader,
                step=self.progress.step + 1,
                first_sample=self.progress.consumed_samples,
            )
            if run.mesh.is_main
            else None
        )

    def fit(self) -> int:
        """Train; returns the exit code (0 done, EXIT_REQUEUE stopped on request with the state saved)."""
        stop = False
        self.console.start(self.progress.step, self.config.last_step)
        with Prefetcher(self.run.loader, self._steps_to_come(), depth=self.config.data.prefetch_batches) as batches:
            while self.progress.step < self.config.last_step and not stop:
                item = next(batches)
                stop = self._step(item.batch, item.data_wait_seconds)
                self._after_step()
        self._save()
        self._report_save(self.run.store.close())
        if stop:
            self.console.say(
                f"stopped on request ({self._stop.reason or 'another rank'}) after step {self.progress.step}"
            )
            return EXIT_REQUEUE
        return EXIT_OK

    def _steps_to_come(self) -> list[tuple[int, int]]:
        """(first sample, samples) of every step that is left."""
        size, done = self.config.train.global_batch, self.progress
        count = self.config.last_step - done.step
        return [(done.consumed_samples + number * size, size) for number in range(count)]

    # -- one step -------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch, data_wait_seconds: float) -> bool:
        """One optimizer step; returns whether any rank asked to stop."""
        run, config, began = self.run, self.config, time.perf_counter()
        self._enter_phase()
        run.clock.step = self.progress.step
        inputs = make_inputs(batch, run.mesh.cp, run.device)
        run.optimizer.zero_grad()
        microbatches = inputs.split(config.train.micro_batch)
        loss = run.engine.train(microbatches, 1.0 / self._num_targets(batch), run.optimizer.begin_last_microbatch)
        events = run.watch.take() if run.watch else []
        if events:
            run.optimizer.spoil_grads()
        run.optimizer.finish_grads()
        tokens = (self.progress.consumed_samples + config.train.global_batch) * config.data.seq_length
        lr = learning_rate(config.optim, tokens, config.run_tokens)
        report = run.optimizer.step(lr, config.optim.clip_norm)
        counts = run.mesh.tp.rank == 0 and run.engine.reports_loss
        message = StepMessage(loss.item() if counts else 0.0, bool(self._stop.reason), step_hash(batch))
        agreed = exchange(message, run.mesh, run.device)
        first_sample = self.progress.consumed_samples
        self.progress.step += 1
        self.progress.consumed_samples += config.train.global_batch
        if self._ledger:
            self._ledger.add(self.progress.step, first_sample, config.train.global_batch, agreed.tokens_hash)
        self._count_skips(report, events, batch)
        self._log(agreed.loss, report, time.perf_counter() - began + data_wait_seconds, data_wait_seconds)
        return agreed.stop

    def _num_targets(self, batch: Batch) -> float:
        """Target tokens of the whole global batch."""
        count = batch.loss_mask.sum(dtype=torch.float64).view(1).to(self.run.device)
        return max(1.0, all_reduce_sum(count, self.run.mesh.dp).item())

    def _enter_phase(self) -> None:
        """Assign the precision of this step; a change is logged as the difference of two tables."""
        plan = self.run.plan
        consumed_tokens = self.progress.consumed_samples * self.config.data.seq_length
        phase = plan.phase_at(consumed_tokens)
        if phase == self._phase:
            return
        if self._phase >= 0:
            changes = precision_table.difference(plan.table(self._phase), plan.table(phase))
            self.console.say(f"step {self.progress.step + 1}: precision changes for {len(changes)} linears")
            self.console.say("\n".join(changes))
        for stage in self.run.engine.stages:
            assign(stage, plan.table(phase))
        self._phase = phase

    def _count_skips(self, report: StepReport, events: list[NonFiniteEvent], batch: Batch) -> None:
        """Count skipped steps in a row and say what was not finite. All ranks come to the same count."""
        self.progress.skipped = self.progress.skipped + 1 if report.skipped else 0
        if not report.skipped:
            return
        mine = [f"{event}, samples {batch.sample_ids.tolist()}" for event in events]
        met = [text for texts in all_gather_object(mine, self.run.mesh.world) for text in texts]
        what = "; ".join(met) if met else "gradients of " + ", ".join(report.nonfinite)
        self.console.say(f"step {self.progress.step}: update skipped on all ranks, NaN or Inf in {what}")
        if self.progress.skipped >= self.config.train.max_skipped_steps:
            raise TrainingDiverged(
                f"{self.progress.skipped} steps in a row had gradients that were not finite, up to step"
                f" {self.progress.step}; the last checkpoint is step {self._saved_step}"
            )

    # -- between steps --------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        train, step = self.config.train, self.progress.step
        if train.eval_interval_steps and (step % train.eval_interval_steps == 0 or step == self.config.total_steps):
            self._evaluate()
        if train.save_interval_steps and step % train.save_interval_steps == 0:
            self._save()
        for report in self.run.store.poll():
            self._report_save(report)

    def _evaluate(self) -> None:
        run = self.run
        for loader in run.evaluations:
            began = time.perf_counter()
            table = run.plan.evaluation_table(self._phase)
            loss = evaluate(run.engine, loader, table, run.mesh, run.device)
            self.metrics.write(self.progress.step, {f"eval/{loader.name}/loss": loss})
            seconds = time.perf_counter() - began
            self.console.say(f"step {self.progress.step}: {loader.name} loss {loss:.4f} ({seconds:.1f} s)")

    def _log(self, loss: float, report: StepReport, seconds: float, data_wait_seconds: float) -> None:
        values = {
            "loss": loss,
            "grad_norm": report.grad_norm,
            "lr": report.lr,
            "skipped": float(report.skipped),
            "consumed_tokens": float(self.progress.consumed_samples * self.config.data.seq_length),
            "tokens_per_second": self.config.tokens_per_step / seconds,
            "step_seconds": seconds,
            "data_wait_seconds": data_wait_seconds,
        }
        self.metrics.write(self.progress.step, values)
        self.console.step(self.progress.step, values)

    def _save(self) -> None:
        """Save unless this step is saved already."""
        if self._saved_step == self.progress.step:
            return
        tokens = self.progress.consumed_samples * self.config.data.seq_length
        report = self.run.store.save(self.progress.step, self.run.optimizer.state_shards(), self._meta(), tokens=tokens)
        self._saved_step = self.progress.step
        self._report_save(report)

    def _report_save(self, report: SaveReport | None) -> None:
        if report is None:
            return
        text = f"checkpoint {report.step}: {report.status.name}"
        if report.error:
            text += f", {report.error}"
        self.console.say(f"{text} (blocked {report.blocking_seconds:.2f} s, {report.seconds:.2f} s in all)")

    def _meta(self) -> dict[str, Any]:
        """All that a resume needs beside the tensors, as plain JSON values."""
        return {
            "consumed_samples": self.progress.consumed_samples,
            "skipped": self.progress.skipped,
            "optimizer_steps": self.run.optimizer.step_count,
            "data": self.run.loader.state_dict(self.progress.consumed_samples),
            "precision": {name: list(formats) for name, formats in self.run.plan.table(self._phase).formats().items()},
            "config": plain(self.config),
            "versions": versions(),
            "wandb_id": self._wandb_id,
        }


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {
        "megatron_fp4": megatron_fp4.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
