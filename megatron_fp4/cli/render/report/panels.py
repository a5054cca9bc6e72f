"""Which charts a report has: losses first, then what runs differ by, then everything that has a point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fp4.cli.render.report.charts import MAX_POINTS, Chart, ChartLine, Points
from megatron_fp4.train.telemetry.gaps import comparable_keys, gap_percent, mark_of, no_gap_because, set_of
from megatron_fp4.train.telemetry.series import SMOOTH_STEPS, RunSeries, matching_keys

LOSS = "loss (nats per token)"


@dataclass(frozen=True)
class Panel:
    """A plot of metrics. keys: which, as a regular expression. unit: as `Chart` has it. quiet: not drawn while all
    values of all runs are one number."""

    title: str
    keys: str
    log: bool = False
    scale: float = 1.0
    unit: str = ""
    quiet: bool = False


PANELS = (
    Panel("gradient norm", "grad_norm", log=True),
    Panel("parameter norm", "param_norm"),
    Panel("learning rate", "lr"),
    Panel("tokens per second: in steps, by the clock", "(wall_)?tokens_per_second", unit="count"),
    Panel("part of the time since the last step that was spent in the step", "goodput", scale=100.0, unit="percent"),
    Panel("model TFLOP/s per device", "tflops"),
    Panel("utilization of the BF16 peak, of the mixed peak", "mfu|mfu_mixed", scale=100.0, unit="percent"),
    Panel("time of a step, and of it the wait for data", "step_seconds|data_wait_seconds", log=True, unit="seconds"),
    Panel("steps without an update, so far", "skipped_steps", unit="count", quiet=True),
    Panel("samples of a step", "batch_samples", unit="count", quiet=True),
    Panel("time of a save: blocking, in all", "save/blocking_seconds|save/seconds", unit="seconds"),
    Panel("time of the slowest rank, by phase", "straggler/(?!waited).*/seconds", unit="seconds"),
    Panel("time of the device in a step, by phase", "device/.*", unit="seconds"),
    Panel("questions answered right", "task/.*", scale=100.0, unit="percent"),
)


def charts(runs: Sequence[RunSeries]) -> list[Chart]:
    """All of them but quantization's."""
    drawn = [losses(runs)]
    if len(runs) > 1:
        drawn.append(_gaps(runs))
    if lines := _dots(runs, "bits_per_byte"):
        drawn.append(Chart("bits per byte of held-out text", lines, about="Independent of the tokenizer."))
    panels = (panel for panel in PANELS if matching_keys(runs, panel.keys))
    return drawn + [chart for panel in panels if (chart := _panel(runs, panel)).lines]


def losses(runs: Sequence[RunSeries]) -> Chart:
    """Every loss, behind it its trend, and held-out losses as dots, a shape for each set."""
    window = SMOOTH_STEPS * max(run.curve("loss").spacing for run in runs)
    lines, every_step = list[ChartLine](), list[ChartLine]()
    broken = list[tuple[int, float, int]]()
    for number, run in enumerate(runs):
        raw, name = Points.of(run, "loss"), run.name
        if run is not runs[0] and (mark := no_gap_because(run, runs[0]) or mark_of(run, runs[0], "loss")):
            name = f"{run.name} ({mark})"
        every = max(1, math.ceil(len(raw.tokens) / (MAX_POINTS // 2)))
        at, steps = raw.tokens[::every], raw.steps[::every] if raw.steps else None
        trend = Points(at, steps, run.curve("loss").trend(window, at).values)
        lines += [ChartLine(name, number, trend, "trend")]
        every_step.append(ChartLine(f"{name}: each step", number, raw, "raw"))
        points = zip(raw.tokens, raw.steps or [], raw.values, strict=True)
        broken += [(number, tokens, step) for tokens, step, value in points if not math.isfinite(value)][:MAX_POINTS]
    lines += _dots(runs, "loss")
    lines += every_step
    about = (
        f"Thick lines go through the middle of {SMOOTH_STEPS} steps, fewer in a short run (of the run with the largest"
        " steps; of as many tokens of the others), thin ones are single steps, dots are held-out losses. A dotted line"
        " stands at a step whose loss is not finite."
    )
    return Chart(LOSS, lines, wide=True, about=about, broken=broken)


def _sets(runs: Sequence[RunSeries]) -> list[str]:
    """The names of all held-out sets; the place in it is the shape of a set's dots."""
    return list(dict.fromkeys(map(set_of, matching_keys(runs, "eval/.*/loss"))))


def _dots(runs: Sequence[RunSeries], metric: str) -> list[ChartLine]:
    """A metric of every held-out set, of all runs that have it."""
    return [
        ChartLine(f"{run.name}: {name}", number, points, "dots", shape=shape)
        for shape, name in enumerate(_sets(runs))
        for number, run in enumerate(runs)
        if (points := Points.of(run, f"eval/{name}/{metric}")).values
    ]


def _gaps(runs: Sequence[RunSeries]) -> Chart:
    """What losses differ by from the first run's, at equal tokens; between tokenizers per byte of text."""
    base, *others = runs
    lines = []
    for number, run in enumerate(others, 1):
        for key in comparable_keys(run, base):
            gap, mark = gap_percent(run, base, key), mark_of(run, base, key)
            name = run.name if key == "loss" else f"{run.name}: {set_of(key)}"
            name += f" ({mark})" if mark else ""
            points = Points(gap.tokens, None, gap.values)
            if key == "loss" and gap.values:
                lines.append(ChartLine(name, number, points))
            elif gap.values:
                lines.append(ChartLine(name, number, points, "dots", shape=_sets(runs).index(set_of(key))))
    about = f"At equal consumed tokens, whatever the batch size; the line is of means of {SMOOTH_STEPS} values at most."
    return Chart(f"loss against {base.name}, percent", lines, unit="percent", wide=True, zero=True, about=about)


def _panel(runs: Sequence[RunSeries], panel: Panel) -> Chart:
    keys = matching_keys(runs, panel.keys)
    lines = []
    for (number, run), (index, key) in itertools.product(enumerate(runs), enumerate(keys)):
        points = Points.of(run, key, panel.scale)
        name = run.name if len(keys) == 1 else f"{run.name}: {key.removesuffix('_seconds').removesuffix('/seconds')}"
        color = None if len(keys) == 1 else number * len(keys) + index
        if any(map(math.isfinite, points.values)):
            lines.append(ChartLine(name, number, points, color=color))
    says_nothing = panel.quiet and len({value for line in lines for value in line.points.values}) < 2
    return Chart(panel.title, [] if says_nothing else lines, unit=panel.unit, log=panel.log)
