"""What is told of every step: numbers to the metrics, a line to the console, its samples to the data ledger.

Not here: evaluations and saves, which the trainer tells when it makes them.
"""

from __future__ import annotations

from megatron_fp4.data.ledger import LedgerWriter
from megatron_fp4.precision.table import difference
from megatron_fp4.train.run import Position, Run, StepResult
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.data_phases import DataPhaseLog
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.monitors.model import ModelMonitors
from megatron_fp4.train.telemetry.norms import parameter_norm
from megatron_fp4.train.telemetry.operator.unsaved import UnsavedWatch
from megatron_fp4.train.telemetry.stragglers import describe, is_due, straggler_metrics
from megatron_fp4.train.telemetry.throughput import Throughput


class StepLog:
    """Follows the steps of one attempt in order, from the one after `position` on. Methods are collective.

    precision_phase: phase of the precision plan in which the present step computes, -1 before the first. The main rank
    writes the data ledger; what an earlier attempt wrote there about these steps is void.
    """

    def __init__(self, run: Run, position: Position, metrics: Metrics, console: Console) -> None:
        self.precision_phase = -1
        self._run = run
        self._metrics = metrics
        self._console = console
        self._data = DataPhaseLog(run, console)
        self._checked = run.probes.checked_table
        self._throughput = Throughput(run.config, run.mesh.world.size, run.device)
        self._unsaved = UnsavedWatch(run.config)
        self._monitors = ModelMonitors(run, metrics, console)
        self._ledger: LedgerWriter | None = None
        if run.mesh.is_main:
            folder, step = run.config.train.run_dir, position.step + 1
            self._ledger = LedgerWriter(
                folder, run.loader, step=step, first_sample=position.samples, evaluations=run.examiner.evaluations
            )

    def begin(self, position: Position) -> None:
        """The step after `position` begins: what changes with it is said."""
        self._enter_precision_phase(position)
        self._data.enter(position)
        step = position.step + 1
        self._run.phases.begin(step, exact=self._compares_ranks(step))

    def end(self, first_sample: int, result: StepResult) -> None:
        """The step that began at `first_sample` has ended."""
        run, step = self._run, result.position.step
        run.phases.enter("log")
        num_samples = self._data.num_samples
        if self._ledger:
            self._ledger.add(step, first_sample, num_samples, result.tokens_hash)
        if result.nonfinite:
            text = f"step {step}: update skipped on all ranks, NaN or Inf in {result.nonfinite}"
            self._console.event("skip", step, text)
        elif result.loss is None:
            text = f"step {step}: update skipped on all ranks, none of its {num_samples} samples has a target"
            self._console.event("skip", step, text)
        values = self._values(result, num_samples * run.config.data.seq_length)
        self._metrics.write(step, values)
        self._console.step(step, values)
        if warning := self._unsaved.warning(step, result.position.samples):
            self._console.say(warning)
        self._tell_checked_gemms(step)
        if run.phases.timer and (device := run.phases.timer.previous_step()):
            self._metrics.write(step - 1, {f"device/{phase}_seconds": value for phase, value in device.items()})
        if self._compares_ranks(step):
            seconds = straggler_metrics(run.phases, run.mesh.world, run.device)
            self._metrics.write(step, seconds)
            self._console.say(f"step {step}: {describe(seconds)}")
        self._monitors.end(step, skipped=result.update.skipped)

    def close(self) -> None:
        if self._ledger:
            self._ledger.close()

    def _compares_ranks(self, step: int) -> bool:
        return is_due(step, self._run.config.train.straggler_interval_steps, self._run.mesh.world)

    def _tell_checked_gemms(self, step: int) -> None:
        """A step whose GEMMs were not those of the table has ended the run."""
        table = self._run.probes.checked_table
        if table is None or table is self._checked:
            return
        self._checked = table
        linears, quantized = len(table.rows), table.num_quantized_gemms
        self._console.say(
            f"step {step}: all GEMMs as planned: {3 * linears} of {linears} linears, {quantized} of them quantized"
            " (train.check_gemms)"
        )

    def _enter_precision_phase(self, position: Position) -> None:
        """A change is logged as the difference of two tables."""
        plan, last = self._run.plan, self.precision_phase
        phase = plan.phase_at(position.samples * self._run.config.data.seq_length)
        if last not in (-1, phase):
            changes = difference(plan.table(last).texts(), plan.table(phase).texts())
            self._console.say("\n".join([f"step {position.step + 1}: precision changes", *changes]))
        self.precision_phase = phase

    def _values(self, result: StepResult, tokens: int) -> dict[str, float]:
        """The numbers of a step of `tokens` tokens. Collective on a step that is logged: the norm reads all weights."""
        run, update = self._run, result.update
        position, table = result.position, run.plan.table(self.precision_phase)
        values = {} if result.loss is None else {"loss": result.loss}
        if values:
            values |= dict(zip(run.config.further_losses, result.further_losses, strict=True))
        values |= {
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "skipped": float(update.skipped),
            "skipped_steps": float(position.skipped_steps),
            "consumed_tokens": float(position.samples * run.config.data.seq_length),
            "precision_phase": float(self.precision_phase),
        }
        values |= self._data.metrics() | self._throughput.metrics(run.phases, table, tokens)
        if position.step % max(1, run.config.train.log_interval_steps) == 0:
            values["param_norm"] = parameter_norm(run.optimizer, run.mesh.world, run.device)
            values |= run.optimizer.rows.report() if run.optimizer.rows else {}
        return values
