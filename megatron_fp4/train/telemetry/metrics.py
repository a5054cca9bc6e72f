"""Where the numbers of a run go.

One idea: `metrics.jsonl` in the run directory is the truth, one object per record, complete whatever happens to the
other sinks. TensorBoard and wandb are copies for people, fed by threads (background_sink.py): if one fails or hangs, it
is switched off with one warning and training goes on. After a resume from an earlier step, or a rollback to one,
records beyond that step are dropped, so each step stands once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from megatron_fp4.storage.append import AppendFile
from megatron_fp4.train.sections import LoggingConfig, WandbMode
from megatron_fp4.train.telemetry.sinks import BackgroundSink, Sink

METRICS_FILE = "metrics.jsonl"


class JsonlSink:
    """One JSON object per line: {"step": 10, "loss": ...}. NaN and infinities are written as strings.

    resume_step: keep the records up to this step of an earlier attempt and drop the later ones.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._file = self._open(resume_step)

    def _open(self, last_step: int) -> AppendFile:
        kept = [line for line in read_lines(self._path) if json.loads(line)["step"] <= last_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, self._path)
        return AppendFile(self._path)

    def rewind(self, step: int) -> None:
        self._file.close()
        self._file = self._open(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        plain = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self._file.add({"step": step, **plain})

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[str]:
    """Complete lines of a metrics file; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [line.strip() for line in lines if line.endswith("\n") and line.strip()]


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in order."""
    return [json.loads(line) for line in read_lines(run_dir / METRICS_FILE)]


class TensorBoardSink:
    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open: Callable[[int], Any] = lambda last: SummaryWriter(str(run_dir / "tensorboard"), purge_step=last + 1)
        self._writer = self._open(resume_step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """wandb with an own step axis. `run_id` is stored in the checkpoint, so that a resume goes on in the same run."""

    def __init__(self, config: LoggingConfig, run_dir: Path, run_id: str, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_name or run_dir.name,
            id=run_id,
            resume="allow",
            mode=_wandb_mode(config.wandb),
            dir=str(run_dir),
            config=settings,
            settings=wandb.Settings(init_timeout=60, console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        pass  # wandb forgets nothing; on the step axis the later record of a step is drawn over the earlier one

    def close(self) -> None:
        self._run.finish()


def _wandb_mode(mode: WandbMode) -> Literal["online", "offline"]:
    if mode is WandbMode.auto:
        import wandb

        return "online" if wandb.login(prompt=False) else "offline"
    return "online" if mode is WandbMode.online else "offline"


class Metrics:
    """All sinks of the main rank; on other ranks construct with no sinks."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []

    @staticmethod
    def open(
        config: LoggingConfig, run_dir: Path, *, resume_step: int, wandb_id: str, settings: dict[str, Any]
    ) -> Metrics:
        """Open the local file and every sink that is asked for. run_dir must exist."""
        metrics = Metrics()
        metrics._sinks.append(JsonlSink(run_dir / METRICS_FILE, resume_step))
        if config.tensorboard:
            metrics.add("tensorboard", lambda: TensorBoardSink(run_dir, resume_step))
        if config.wandb is not WandbMode.disabled:
            metrics.add("wandb", lambda: WandbSink(config, run_dir, wandb_id, settings))
        return metrics

    def add(self, name: str, make: Callable[[], Sink]) -> None:
        """One more sink, made and fed by a thread of its own."""
        self._sinks.append(BackgroundSink(name, make))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the numbers of a step."""
        for sink in self._sinks:
            sink.write(step, values)

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`: they are made again."""
        for sink in self._sinks:
            sink.rewind(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
