"""Everything that is watched of the model while it trains, on the steps that are due."""

from __future__ import annotations

from megatron_fp4.train.run import Run
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.monitors.experts import ExpertMonitor
from megatron_fp4.train.telemetry.monitors.health import HealthMonitor
from megatron_fp4.train.telemetry.monitors.residuals import write_residuals
from megatron_fp4.train.telemetry.quantization import write_statistics


class ModelMonitors:
    """Follows the steps of one attempt: quantized operands, residual stream, FP4 health, experts."""

    def __init__(self, run: Run, metrics: Metrics, console: Console) -> None:
        self._run = run
        self._metrics = metrics
        self._console = console
        self._health = HealthMonitor(run, metrics, console)
        self._experts = ExpertMonitor(run, metrics, console)

    def end(self, step: int, *, skipped: bool) -> None:
        """A step has ended, without an update if `skipped`. Collective over the world."""
        write_statistics(self._run, step, self._metrics)
        write_residuals(self._run, step, self._metrics, self._console)
        self._health.end(step)
        self._experts.end(step, skipped=skipped)
