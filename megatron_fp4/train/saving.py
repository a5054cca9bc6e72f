"""When the state of a run goes to the disk, and what goes there beside the tensors."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import torch

import megatron_fp4
from megatron_fp4.checkpoint import SaveReport, SaveStatus
from megatron_fp4.train.build import Run
from megatron_fp4.train.console import Console
from megatron_fp4.train.metrics import Metrics
from megatron_fp4.train.plain import plain
from megatron_fp4.train.progress import Progress


class Saves:
    """Saves each step at most once, and tells the outcome. last_step: the step of the newest save, -1 before any."""

    def __init__(self, run: Run, metrics: Metrics, console: Console) -> None:
        self._run, self._metrics, self._console = run, metrics, console
        self.last_step = run.resumed["step"] if run.resumed else -1

    def save(self, progress: Progress, meta: Callable[[], dict[str, Any]]) -> None:
        """Begin to save unless this step is saved already. Collective."""
        if self.last_step == progress.step:
            return
        run = self._run
        tokens = progress.consumed_samples * run.config.data.seq_length
        report = run.store.save(progress.step, run.optimizer.state_shards(), meta(), tokens=tokens)
        self.last_step = progress.step
        self._tell(report)

    def poll(self) -> None:
        """Tell what has ended meanwhile; no communication."""
        for report in self._run.store.poll():
            self._tell(report)

    def close(self) -> None:
        """Wait for the running save. Collective."""
        self._tell(self._run.store.close())

    def _tell(self, report: SaveReport | None) -> None:
        if report is None:
            return
        text = f"checkpoint {report.step}: {report.status.name}"
        if report.error:
            text += f", {report.error}"
        self._console.say(f"{text} (blocked {report.blocking_seconds:.2f} s, {report.seconds:.2f} s in all)")
        if report.status is not SaveStatus.writing:
            values = {"blocking_seconds": report.blocking_seconds, "seconds": report.seconds}
            values["failed"] = float(report.status is SaveStatus.failed)
            self._metrics.write(report.step, {f"save/{key}": value for key, value in values.items()})


def meta_of(run: Run, progress: Progress, precision_phase: int, wandb_id: str) -> dict[str, Any]:
    """All that a resume needs beside the tensors, as plain JSON values."""
    return {
        "consumed_samples": progress.consumed_samples,
        "skipped": progress.skipped,
        "skipped_steps": progress.skipped_steps,
        "optimizer_steps": run.optimizer.step_count,
        "data": run.loader.state_dict(progress.consumed_samples),
        "precision": {name: list(formats) for name, formats in run.plan.table(precision_phase).formats().items()},
        "config": plain(run.config),
        "versions": versions(),
        "wandb_id": wandb_id,
    }


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {
        "megatron_fp4": megatron_fp4.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
