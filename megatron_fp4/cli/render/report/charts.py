"""A chart as data: what page.js draws, as JSON. Nothing here knows how it looks.

A run of millions of steps would make a page of gigabytes, so a line keeps at most MAX_POINTS points: of each stretch
the lowest and the highest, so that no spike gets lost. Every point that is kept is one that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_fp4.train.telemetry.series import RunSeries

MAX_POINTS = 1500
DIGITS = 6


@dataclass(frozen=True)
class Points:
    """A metric of a run. steps: None for what belongs to no step of one run, such as a difference of two."""

    tokens: list[float]
    steps: list[int] | None
    values: list[float]

    @staticmethod
    def of(run: RunSeries, key: str, scale: float = 1.0) -> Points:
        curve = run.curve(key)
        return Points(curve.tokens, run.steps_of(key), [scale * value for value in curve.values])

    def thinned(self, limit: int = MAX_POINTS) -> Points:
        """A selection of at most so many; of what is not finite the first of each stretch, beside them."""
        if len(self.values) <= limit:
            return self
        stretch = math.ceil(2 * len(self.values) / limit)
        kept = list(self._lowest_and_highest(stretch))
        steps = None if self.steps is None else [self.steps[one] for one in kept]
        return Points([self.tokens[one] for one in kept], steps, [self.values[one] for one in kept])

    def _lowest_and_highest(self, stretch: int) -> Iterator[int]:
        for first in range(0, len(self.values), stretch):
            numbers = range(first, min(first + stretch, len(self.values)))
            finite = [one for one in numbers if math.isfinite(self.values[one])]
            broken = [one for one in numbers if not math.isfinite(self.values[one])][:1]
            ends = (chosen(finite, key=self.values.__getitem__) for chosen in (min, max) if finite)
            yield from sorted({*ends, *broken})


@dataclass(frozen=True)
class ChartLine:
    """A line of a chart. run: number of its run, whose colour it has, and with which it is hidden. color: of a line
    that has one of its own, from 0. style: "line", "raw" (behind a trend), "trend" or "dots". shape: of the dots, from
    0. shown: whether it is drawn before anybody asks.
    """

    name: str
    run: int
    points: Points
    style: str = "line"
    color: int | None = None
    shape: int = 0
    shown: bool = True

    def json(self) -> dict[str, Any]:
        points = self.points.thinned()
        values = [_rounded(value) if math.isfinite(value) else None for value in points.values]
        look = {"name": self.name, "run": self.run, "style": self.style, "color": self.color, "shape": self.shape}
        return look | {"shown": self.shown, "t": points.tokens, "s": points.steps, "y": values}


@dataclass(frozen=True)
class Chart:
    """A plot over consumed tokens, or steps. unit: "", "seconds", "percent" or "count": how page.js writes numbers.

    wide: as wide as the page. broken: (run, tokens, step) where a value was not finite. about: a sentence below it.
    """

    title: str
    lines: Sequence[ChartLine]
    unit: str = ""
    log: bool = False
    wide: bool = False
    zero: bool = False
    about: str = ""
    broken: Sequence[tuple[int, float, int]] = field(default_factory=tuple)

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"lines": [line.json() for line in self.lines]}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
