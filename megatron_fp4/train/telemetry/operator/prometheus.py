"""The newest numbers of a run as a text file for node_exporter's textfile collector (`logging.prometheus_file`).

    megatron_fp4_loss{run="nvfp4_8b"} 2.0312

A key of metrics.jsonl is a gauge, its slashes underscores. The file is replaced as a whole, so a scrape never reads
half of it, at most once a second. It stays behind when the run ends: `megatron_fp4_updated_seconds` is when it was
written, and an alert on its age is the one that also sees a node that died.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

INTERVAL_SECONDS = 1.0
PREFIX = "megatron_fp4_"


class PrometheusFile:
    """A sink (sinks.py). run: the value of the label `run`. Raises OSError where the folder is not there."""

    def __init__(self, path: Path, run: str) -> None:
        self._path, self._run = path, run
        self._values: dict[str, float] = {}
        self._written = -math.inf
        self._replace()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._values |= {"step": float(step), **values}
        if time.monotonic() - self._written >= INTERVAL_SECONDS:
            self._replace()

    def rewind(self, step: int) -> None:
        self._values["step"] = float(step)

    def close(self) -> None:
        self._replace()

    def _replace(self) -> None:
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")  # the collector reads *.prom only
        new.write_text(as_text({**self._values, "updated_seconds": time.time()}, self._run))
        os.replace(new, self._path)
        self._written = time.monotonic()


def as_text(values: Mapping[str, float], run: str) -> str:
    """The exposition format, version 0.0.4; the prefix stands before every name."""
    label = run.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines = []
    for name, value in sorted({re.sub(r"\W", "_", key): value for key, value in values.items()}.items()):
        lines += [f"# TYPE {PREFIX}{name} gauge", f'{PREFIX}{name}{{run="{label}"}} {_number(value)}']
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}[str(value)]
