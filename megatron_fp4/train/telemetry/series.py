"""The numbers of a run as its `metrics.jsonl` has them, by step: what text, plots and pages about runs are made of.

A curve lies over consumed tokens, not over steps: two runs with other batch sizes have no step in common, and a run
that is half finished has only its own half. NaN and infinities, which the file holds as text, are numbers here.

Not here: two runs side by side (gaps.py), the clock (goodput.py), how they are shown (cli/report.py, cli/render/), and
the writing of the file (metrics.py).
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.data.ledger import DataIdentity, read_identity
from megatron_fp4.storage.append import read_values
from megatron_fp4.train.telemetry.metrics import read_metrics
from megatron_fp4.train.telemetry.operator.events import EVENTS_FILE, first_steps

SMOOTH_STEPS = 20
"""Steps whose mean stands for the training loss of one step."""
RATES = (
    r"(wall_)?tokens_per_second|(step|wall|data_wait)_seconds|goodput|tflops|mfu|mfu_mixed|device/.*|save/.*seconds"
    r"|straggler/.*/(seconds|median)"
)
"""Metrics of which the median is shown: one step says nothing about speed, the first of a launch least of all."""
NOT_FINITE = ("nan", "inf", "-inf")


@dataclass(frozen=True)
class Curve:
    """A metric over consumed tokens, which rise."""

    tokens: list[float]
    values: list[float]

    def smooth(self) -> Curve:
        """The means of the last SMOOTH_STEPS values; NaN where one of them is."""
        windows = (self.values[max(0, end - SMOOTH_STEPS) : end] for end in range(1, len(self.values) + 1))
        return Curve(self.tokens, [sum(window) / len(window) for window in windows])

    def trend(self, tokens: float, at: Sequence[float] | None = None) -> Curve:
        """Straight lines fitted to the finite values within `tokens` around each point, half of it on either side.

        A mean of the values before lies above a falling curve; this goes through its middle, at the ends too. Where a
        curve bends, a long line would leave it: a window is no longer than an eighth of the curve, and than two thirds
        of what is before it. NaN where a value is not finite, or nothing is near. at: the points, those of the curve
        if not said.
        """
        xs, ys = np.array(self.tokens), np.array(self.values)
        broken = set(xs[~np.isfinite(ys)].tolist())
        xs, ys = xs[np.isfinite(ys)], ys[np.isfinite(ys)]
        points = list(self.tokens if at is None else at)
        fitted = []
        for one in points:
            reach = min(tokens / 2, (one - self.tokens[0]) / 3, (self.tokens[-1] - self.tokens[0]) / 16)
            first = np.searchsorted(xs, min(one - reach, self.tokens[-1] - 2 * reach))
            end = np.searchsorted(xs, one + reach, side="right")
            fitted.append(_line_at(one, xs[first:end], ys[first:end]))
        return Curve(points, [math.nan if one in broken else y for one, y in zip(points, fitted, strict=True)])

    @property
    def spacing(self) -> float:
        """Median tokens from one point to the next; 0 for fewer than two points."""
        return median([b - a for a, b in itertools.pairwise(self.tokens)]) if len(self.tokens) > 1 else 0.0

    def at(self, tokens: Sequence[float]) -> Curve:
        """The values at these tokens, between two points on the line that joins them.

        Raises IndexError for tokens before the first point or behind the last.
        """
        return Curve(list(tokens), [self._value_at(one) for one in tokens])

    def _value_at(self, tokens: float) -> float:
        right = bisect_left(self.tokens, tokens)
        if self.tokens[right] == tokens:
            return self.values[right]
        if right == 0:
            raise IndexError(f"{tokens:g} tokens, the curve begins at {self.tokens[0]:g}")
        left = right - 1
        part = (tokens - self.tokens[left]) / (self.tokens[right] - self.tokens[left])
        return self.values[left] + part * (self.values[right] - self.values[left])


@dataclass(frozen=True)
class RunSeries:
    """One run.

    name: tells it from the others of a report. steps: everything that was recorded of a step, by step. settings: as its
    config.yaml has them, None where there is none. data: content of what it read, None where it kept no ledger.
    launched: the steps that were the first of a launch.
    """

    folder: Path
    name: str
    steps: dict[int, dict[str, Any]]
    settings: Mapping[str, Any] | None = None
    data: DataIdentity | None = None
    launched: frozenset[int] = frozenset()

    @staticmethod
    def read(folder: Path, name: str = "", settings: Mapping[str, Any] | None = None) -> RunSeries:
        """The series of a run directory. name: "" = the directory's. Raises ValueError without a complete record."""
        steps: dict[int, dict[str, Any]] = {}
        for record in read_metrics(folder):
            steps.setdefault(record["step"], {}).update(_numbers(record))
        steps = dict(sorted(steps.items()))
        tokens = [(step, values["consumed_tokens"]) for step, values in steps.items() if "consumed_tokens" in values]
        if not tokens:
            raise ValueError(f"run {folder} has no metrics.jsonl with complete records of steps")
        for (step, before), (next_step, after) in itertools.pairwise(tokens):
            if after < before:
                raise ValueError(
                    f"run {folder}: {before:g} tokens were consumed by step {step}, {after:g} by step {next_step}; its"
                    " metrics.jsonl is of several runs"
                )
        launched = first_steps(read_values(folder / EVENTS_FILE)) | {tokens[0][0]}
        return RunSeries(folder, name or folder.name, steps, settings, read_identity(folder), launched)

    @property
    def last_step(self) -> int:
        return max(self.steps)

    @property
    def last_tokens(self) -> float:
        """Tokens consumed by the newest step."""
        return max(values.get("consumed_tokens", 0.0) for values in self.steps.values())

    @cached_property
    def keys(self) -> frozenset[str]:
        return frozenset(key for values in self.steps.values() for key in values)

    def curve(self, key: str) -> Curve:
        """A metric; its tokens are those of the nearest step before that has them."""
        points = self._points.get(key, [])
        return Curve([tokens for _, tokens, _ in points], [value for _, _, value in points])

    def steps_of(self, key: str) -> list[int]:
        """The steps that the points of `curve` are of."""
        return [step for step, _, _ in self._points.get(key, [])]

    @cached_property
    def _points(self) -> dict[str, list[tuple[int, float, float]]]:
        """Step, tokens and value of every metric, in one pass: a large model has thousands, each in a few steps."""
        seen, points = 0.0, dict[str, list[tuple[int, float, float]]]()
        for step, values in self.steps.items():
            seen = values.get("consumed_tokens", seen)
            for key, value in values.items():
                if isinstance(value, int | float):
                    points.setdefault(key, []).append((step, seen, float(value)))
        return points

    def summary(self, key: str) -> float | None:
        """What stands for a metric in a table, None if there is none of it.

        Of the loss the mean of the last SMOOTH_STEPS, of the gradient norm their median, of everything else the newest
        value. Of RATES the median of all steps but the first of each launch, if there are others: of two in the middle
        the slower one, so that a time and the rate of it are of one step.
        """
        curve = self.curve(key)
        if not curve.values:
            return None
        if key == "loss":
            return curve.smooth().values[-1]
        if key == "grad_norm":
            return median(curve.values[-SMOOTH_STEPS:])
        if not re.fullmatch(RATES, key):
            return curve.values[-1]
        pairs = list(zip(self.steps_of(key), curve.values, strict=True))
        later = [value for step, value in pairs if step not in self.launched and math.isfinite(value)]
        finite = later or [value for value in curve.values if math.isfinite(value)]
        slower = statistics.median_high if re.search("seconds$|median$", key) else statistics.median_low
        return slower(finite) if finite else math.nan

    @property
    def num_smoothed(self) -> int:
        """The number of steps that the training loss of `summary` is the mean of."""
        return min(SMOOTH_STEPS, len(self.curve("loss").values))

    def not_finite(self, key: str) -> list[int]:
        """The steps at which a metric is NaN or infinite."""
        pairs = ((step, values.get(key)) for step, values in self.steps.items())
        return [step for step, value in pairs if isinstance(value, float) and not math.isfinite(value)]


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What is a number in a record; consumed tokens only if they are finite."""
    numbers = {key: float(value) if value in NOT_FINITE else value for key, value in record.items()}
    numbers = {key: value for key, value in numbers.items() if type(value) in (int, float)}
    if not math.isfinite(numbers.get("consumed_tokens", 0.0)):
        del numbers["consumed_tokens"]
    return numbers


def _line_at(x: float, xs: NDArray[np.float64], ys: NDArray[np.float64]) -> float:
    """At `x`, the straight line of least squares through some points; NaN without any."""
    if len(xs) == 0:
        return math.nan
    away = xs - xs.mean()
    spread = float((away**2).sum())
    slope = float((away * ys).sum()) / spread if spread else 0.0
    return float(ys.mean()) + slope * (x - float(xs.mean()))


def median(values: Iterable[float]) -> float:
    """Their median without those that are not finite; NaN if none is."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def read_runs(
    folders: Sequence[Path], read_settings: Callable[[Path], Mapping[str, Any] | None] = lambda _: None
) -> list[RunSeries]:
    """The series of several runs, whose names differ. Raises ValueError for a run that is named twice, or without one.

    read_settings: a run directory -> what its config.yaml holds.
    """
    places = [folder.resolve() for folder in folders]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise ValueError(f"run {folders[number]} is named twice: compared with itself it is always equal")
    names = distinguishing_names(places)
    return [RunSeries.read(folder, name, read_settings(folder)) for folder, name in zip(folders, names, strict=True)]


def distinguishing_names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as no other path ends in: `a/run` and `b/run`.

    places: absolute, all different.
    """
    names = []
    for place in places:
        others = [other.parts for other in places if other != place]
        count = 1
        while any(parts[-count:] == place.parts[-count:] for parts in others):
            count += 1
        names.append("/".join(place.parts[-count:]).replace("//", "/"))
    return names


def matching_keys(runs: Iterable[RunSeries], pattern: str) -> list[str]:
    """The metrics of any of the runs that match a regular expression as a whole."""
    return sorted({key for run in runs for key in run.keys if re.fullmatch(pattern, key)})
