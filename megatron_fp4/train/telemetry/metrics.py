"""Where the numbers of a run go.

`metrics.jsonl` in the run directory is the truth, one object per record, complete whatever happens to the copies for
people (sinks.py). After a resume from an earlier step, or a rollback to one, records beyond that step are dropped, so
each step stands once. What a power cut has damaged is set aside in `metrics.jsonl.damaged`, and no reason to stop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fp4.storage.append import AppendFile, read_lines, read_values
from megatron_fp4.storage.durable import write_durably
from megatron_fp4.train.sections import LoggingConfig, WandbMode
from megatron_fp4.train.telemetry.operator.prometheus import PrometheusFile
from megatron_fp4.train.telemetry.sinks import BackgroundSink, Sink, TensorBoardSink, WandbSink

log = logging.getLogger(__name__)
METRICS_FILE = "metrics.jsonl"


class JsonlSink:
    """One JSON object per line: {"step": 10, "loss": ...}. NaN and infinities are written as strings.

    resume_step: keep the records up to this step of an earlier attempt and drop the later ones.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        self._path = path
        self._file = self._open(resume_step)

    def _open(self, last_step: int) -> AppendFile:
        lines = list(read_lines(self._path))
        kept = [line.text for line in lines if line.value is not None and line.value["step"] <= last_step]
        if damaged := [line.text for line in lines if line.value is None]:
            aside = self._path.with_name(f"{self._path.name}.damaged")
            with open(aside, "ab") as file:
                file.writelines(text + b"\n" for text in damaged)
            log.warning("%s: %d damaged line(s) were set aside in %s", self._path, len(damaged), aside.name)
        write_durably(self._path, *(text + b"\n" for text in kept))
        return AppendFile(self._path)

    def rewind(self, step: int) -> None:
        self._file.close()
        self._file = self._open(step)

    def write(self, step: int, values: dict[str, float]) -> None:
        json_values = {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
        self._file.add({"step": step, **json_values})

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in order; damaged lines are left out, which is logged."""
    return list(read_values(run_dir / METRICS_FILE))


class Metrics:
    """All sinks of the main rank; without sinks on the others."""

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
        if config.prometheus_file:
            metrics.add("prometheus", lambda: PrometheusFile(Path(config.prometheus_file), run_dir.resolve().name))
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
