"""What quantization costs, by linear and operand, worst first: charts of the worst, a table of all.

A model has a thousand such operands; eight lines can be told apart. The table says of all of them where they stand, and
a click there draws a line more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fp4.cli.render.report.charts import MAX_POINTS, Chart, ChartLine, Points
from megatron_fp4.train.telemetry.quantization import FOLDER
from megatron_fp4.train.telemetry.series import RunSeries, matching_keys

SHOWN = 8
MAX_NUMBERS = 60_000
"""Numbers that all lines of one chart may have together."""


@dataclass(frozen=True)
class Statistic:
    """A field of the metrics `quantization/LINEAR/OPERAND/FIELD`. low_is_bad: whether small values are the worse."""

    field: str
    title: str
    about: str
    unit: str = ""
    scale: float = 1.0
    low_is_bad: bool = False


STATISTICS = (
    Statistic("snr_db", "signal to noise of quantized operands, dB", "Low is bad.", low_is_bad=True),
    Statistic("underflow", "non-zero elements that became zero", "High is bad.", "percent", 100.0),
    Statistic("saturation", "elements beyond the largest code", "High is bad.", "percent", 100.0),
)


@dataclass(frozen=True)
class OperandRow:
    """An operand of a linear of a run. values: per statistic its newest value and the worst of all, scaled."""

    run: int
    name: str
    values: list[tuple[float, float]]


def quantization_charts(runs: Sequence[RunSeries]) -> list[Chart]:
    """A chart per statistic, none where nothing was measured. Lines are ordered worst first by their newest value."""
    return [chart for one in STATISTICS if (chart := _chart(runs, one)).lines]


def operand_rows(runs: Sequence[RunSeries]) -> list[OperandRow]:
    """Every operand, by signal to noise, worst first."""
    rows = []
    for number, run in enumerate(runs):
        for key in matching_keys([run], f"{FOLDER}/.*/{STATISTICS[0].field}"):
            name = _operand(key)
            values = [
                (curve[-1], (min if one.low_is_bad else max)(curve))
                for one in STATISTICS
                if (curve := Points.of(run, f"{FOLDER}/{name}/{one.field}", one.scale).values)
            ]
            rows.append(OperandRow(number, name, values))
    return sorted(rows, key=lambda row: row.values[0][0])


def _operand(key: str) -> str:
    return key.removeprefix(f"{FOLDER}/").rpartition("/")[0]


def _chart(runs: Sequence[RunSeries], statistic: Statistic) -> Chart:
    return worst_first(runs, f"{FOLDER}/", f"/{statistic.field}", statistic)


def worst_first(
    runs: Sequence[RunSeries], before: str, behind: str, statistic: Statistic, *, log: bool = False
) -> Chart:
    """A chart of the metrics whose keys are a name between two texts, the worst ones drawn; it may be empty."""
    measured = [
        (number, key.removeprefix(before).removesuffix(behind), Points.of(run, key, statistic.scale))
        for number, run in enumerate(runs)
        for key in matching_keys([run], f"{before}.*{behind}")
    ]
    measured.sort(key=lambda one: one[2].values[-1], reverse=not statistic.low_is_bad)
    limit = max(20, min(MAX_POINTS, MAX_NUMBERS // max(1, len(measured))))
    lines = [
        ChartLine(f"{runs[number].name}: {name}", number, points.thinned(limit), color=place, shown=place < SHOWN)
        for place, (number, name, points) in enumerate(measured)
    ]
    about = f"{statistic.about} The {min(SHOWN, len(lines))} worst of {len(lines)}, by the newest measurement."
    return Chart(statistic.title, lines, unit=statistic.unit, log=log, wide=True, about=about)
