"""When the state of a run goes to the disk, and what goes there beside the tensors.

Not here: how it gets there and back (checkpoint/), which state a run begins with (origin.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_fp4.checkpoint import SaveFailed, SaveReport, SaveStatus
from megatron_fp4.settings import to_json_values
from megatron_fp4.train.resume.provenance import git_state, versions
from megatron_fp4.train.run import Position, Run
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics

STOP_SECONDS = 60.0
"""A run that is stopped on request waits for its mirror no longer."""


class Saves:
    """Saves each step of an attempt at most once, and reports the outcome.

    position: where the attempt begins; its state is on the disk, or the initial one. last_step: the step that was saved
    last.
    """

    def __init__(self, run: Run, position: Position, metrics: Metrics, console: Console) -> None:
        self._run = run
        self._metrics = metrics
        self._console = console
        self.last_step = position.step
        self._newest: SaveReport | None = None

    def save(self, position: Position, meta: Callable[[], dict[str, Any]], score: float | None) -> None:
        """Begin to save unless this step is saved already. score: held-out loss of this step, if known. Collective."""
        if self.last_step == position.step:
            return
        run = self._run
        tokens = position.samples * run.config.data.seq_length
        report = run.store.save(position.step, run.optimizer.state_shards(), meta(), tokens=tokens, score=score)
        self.last_step = position.step
        self._report(report)

    def poll(self) -> None:
        """Report saves that have ended since the last call; no communication."""
        for report in self._run.store.poll():
            self._report(report)
        tell_mirror(self._run, self._metrics, self._console)

    def finish(self, position: Position, meta: Callable[[], dict[str, Any]], score: float | None) -> None:
        """Save the last state and wait until it is on disk; once more if that fails. Collective. Raises SaveFailed."""
        store = self._run.store
        for _ in range(2):
            self.save(position, meta, score)
            self._report(store.close())
            if self._newest is None or self._newest.status is not SaveStatus.failed:
                return
            self.last_step = -1
        assert self._newest is not None
        raise SaveFailed(
            f"the state after step {position.step}, the last one, was not saved: {self._newest.error}; the newest"
            f" checkpoint is that of step {store.latest()}. Start the same command again when there is room"
        )

    def _report(self, report: SaveReport | None) -> None:
        if report is None:
            return
        self._newest = report
        if report.status is SaveStatus.writing:
            return
        text = f"checkpoint {report.step}: {report.status.name}"
        if report.error:
            text += f", {report.error}"
        self._console.say(f"{text} (blocked {report.blocking_seconds:.2f} s, {report.seconds:.2f} s in all)")
        if report.status is SaveStatus.failed:
            self._console.events.add("save_failed", report.step, text)
        values = {"blocking_seconds": report.blocking_seconds, "seconds": report.seconds}
        values["failed"] = float(report.status is SaveStatus.failed)
        self._metrics.write(report.step, {f"save/{key}": value for key, value in values.items()})


def tell_mirror(run: Run, metrics: Metrics, console: Console) -> None:
    """Report what has come of uploads since the last call; no communication."""
    for report in run.store.mirror.poll() if run.store.mirror else ():
        metrics.write(
            report.step,
            {"mirror/seconds": report.seconds, "mirror/bytes": report.num_bytes, "mirror/failures": report.failures},
        )
        if report.error:
            text = f"checkpoint {report.step} is not in the mirror: {report.error} (failure {report.failures} in a row)"
            if report.failures == 1:
                console.event("mirror_failed", report.step, text)
            else:
                console.say(text)
        else:
            after = f", after {report.failures} failed tries" if report.failures else ""
            console.say(f"checkpoint {report.step}: in the mirror{after} ({report.seconds:.2f} s)")


def finish_mirror(run: Run, metrics: Metrics, console: Console, *, stopped: bool) -> None:
    """Wait at the end of a run for what its mirror lacks, and say what it lacks still. Collective.

    stopped: on request; whoever asked for it may kill the job soon.
    """
    config = run.config.checkpoint
    seconds = min(config.mirror_wait_seconds, STOP_SECONDS) if stopped else config.mirror_wait_seconds
    missing = run.store.mirror.finish(seconds) if run.store.mirror else []
    tell_mirror(run, metrics, console)
    if missing:
        steps = ", ".join(map(str, missing))
        text = (
            f"WARNING: not in the mirror {config.mirror} after {seconds:g} s (checkpoint.mirror_wait_seconds, at most"
            f" {STOP_SECONDS:g} when stopped): checkpoints of steps {steps}, which are on the disk; the same command"
            " again sends them"
        )
        console.event("mirror_failed", missing[0], text)


def meta_of(run: Run, position: Position, precision_phase: int, wandb_id: str) -> dict[str, Any]:
    """All that a resume needs beside the tensors, as plain JSON values."""
    config = run.config
    return {
        **position.to_meta(),
        "lr": config.learning_rate(position.samples * config.data.seq_length),
        "optimizer_steps": run.optimizer.step_count,
        "data": run.loader.state_dict(position.samples),
        "precision": run.plan.table(precision_phase).texts(),
        "config": to_json_values(run.config),
        "versions": versions(),
        "git": git_state() if run.mesh.is_main else None,  # the main rank's is stored
        "wandb_id": wandb_id,
        **run.origin,
    }
