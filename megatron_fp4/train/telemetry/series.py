"""The numbers of a run as its `metrics.jsonl` has them, by step: what text, plots and pages about runs are made of.

Not here: how they are shown (cli/report.py, cli/render/), and the writing of the file (metrics.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_fp4.train.telemetry.metrics import read_metrics

SMOOTH_STEPS = 20
"""Steps whose mean stands for the training loss of one step."""


@dataclass(frozen=True)
class Curve:
    """A metric over consumed tokens, in the order of the steps; values that are not finite are left out."""

    tokens: list[float]
    values: list[float]

    def smooth(self) -> Curve:
        """The means of the last SMOOTH_STEPS values."""
        windows = (self.values[max(0, end - SMOOTH_STEPS) : end] for end in range(1, len(self.values) + 1))
        return Curve(self.tokens, [sum(window) / len(window) for window in windows])


@dataclass(frozen=True)
class RunSeries:
    """One run. steps: everything that was recorded of a step, by step."""

    folder: Path
    steps: dict[int, dict[str, Any]]

    @staticmethod
    def read(folder: Path) -> RunSeries:
        """The series of a run directory. Raises ValueError if it holds no complete record."""
        steps: dict[int, dict[str, Any]] = {}
        for record in read_metrics(folder):
            steps.setdefault(record["step"], {}).update(record)
        if not steps:
            raise ValueError(f"run {folder.name} has no metrics.jsonl with complete records")
        return RunSeries(folder, dict(sorted(steps.items())))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def last_step(self) -> int:
        return max(self.steps)

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(key for values in self.steps.values() for key in values)

    def curve(self, key: str) -> Curve:
        """A metric; its tokens are those of the nearest step before that has them."""
        seen, curve = 0.0, Curve([], [])
        for values in self.steps.values():
            seen = values.get("consumed_tokens", seen)
            if isinstance(values.get(key), int | float):
                curve.tokens.append(seen)
                curve.values.append(float(values[key]))
        return curve

    def last(self, key: str) -> float | None:
        """The newest value of a metric; of the loss the mean of the last SMOOTH_STEPS. None if there is none."""
        curve = self.curve(key).smooth() if key == "loss" else self.curve(key)
        return curve.values[-1] if curve.values else None


def matching_keys(runs: Iterable[RunSeries], pattern: str) -> list[str]:
    """The metrics of any of the runs that match a regular expression as a whole."""
    return sorted({key for run in runs for key in run.keys if re.fullmatch(pattern, key)})


def gap_percent(run: RunSeries, base: RunSeries) -> Curve:
    """Difference of the smoothed training losses at equal steps, in percent of `base`."""
    steps = [step for step, values in run.steps.items() if "loss" in values and "loss" in base.steps.get(step, {})]
    ours, theirs = (RunSeries(of.folder, {step: of.steps[step] for step in steps}).curve("loss") for of in (run, base))
    pairs = zip(ours.smooth().values, theirs.smooth().values, strict=True)
    return Curve(ours.tokens, [100 * (a - b) / b for a, b in pairs])


def different_numbers(run: RunSeries, other: RunSeries, first: int, last: int) -> list[str]:
    """Where loss and gradient norm of steps `first` to `last` are not the same, bit for bit, or not in both."""
    return [
        f"step {step}: {key} {ours.get(key)} in {run.name}, {theirs.get(key)} in {other.name}"
        for step in range(first, last + 1)
        for ours, theirs in [(run.steps.get(step, {}), other.steps.get(step, {}))]
        for key in ("loss", "grad_norm")
        if key not in ours or ours[key] != theirs.get(key)
    ]
