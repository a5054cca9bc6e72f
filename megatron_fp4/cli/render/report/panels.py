"""Which charts a report has: losses first, then what runs differ by, then everything that has a point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fp4.cli.render.report.charts import MAX_POINTS, Chart, ChartLine, Points
from megatron_fp4.train.telemetry.gaps import gap_percent, mark_of, no_gap_because, set_of
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
    if evaluations := matching_keys(runs, "eval/.*/bits_per_byte"):
        lines = [line for key in evaluations for line in _dots(runs, key, evaluations.index(key), "/bits_per_byte")]
        drawn.append(Chart("bits per byte of held-out text", lines, about="Independent of the tokenizer."))
    panels = (panel for panel in PANELS if matching_keys(runs, panel.keys))
    return drawn + [chart for panel in panels if (chart := _panel(runs, panel)).lines]


def losses(runs: Sequence[RunSeries]) -> Chart:
    """Every loss, behind it its trend, and held-out losses as dots, a shape for each set."""
    window = SMOOTH_STEPS * max(run.curve("loss").spacing for run in runs)
    sets = matching_keys(runs, "eval/.*/loss")
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
    lines += [line for index, key in enumerate(sets) for line in _dots(runs, key, index, "/loss")]
    lines += every_step
    about = (
        f"Thick lines go through the middle of {SMOOTH_STEPS} steps, fewer in a short run (of the run with the largest"
        " steps; of as many tokens of the others), thin ones are single steps, dots are held-out losses. A dotted line"
        " stands at a step whose loss is not finite."
    )
    return Chart(LOSS, lines, wide=True, about=about, broken=broken)


def _dots(runs: Sequence[RunSeries], key: str, shape: int, ending: str) -> list[ChartLine]:
    """A held-out metric of all runs that have it."""
    points = ((number, run, Points.of(run, key)) for number, run in enumerate(runs))
    name = set_of(key.removesuffix(ending))
    return [ChartLine(f"{run.name}: {name}", n, one, "dots", shape=shape) for n, run, one in points if one.values]


def _gaps(runs: Sequence[RunSeries]) -> Chart:
    """What losses differ by from the first run's, at equal tokens."""
    base, *others = runs
    lines = []
    for number, run in enumerate(others, 1):
        if no_gap_because(run, base):
            continue
        for shape, key in enumerate(["loss", *matching_keys([run, base], "eval/.*/loss")]):
            gap = gap_percent(run, base, key)
            mark = mark_of(run, base, key)
            of = f"{run.name}: {set_of(key)}" if shape else run.name
            points = Points(gap.tokens, None, gap.values)
            if gap.values:
                style = "dots" if shape else "line"
                lines.append(
                    ChartLine(f"{of} ({mark})" if mark else of, number, points, style, shape=max(0, shape - 1))
                )
    about = f"At equal consumed tokens, whatever the batch size; the line is of means of {SMOOTH_STEPS} values."
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
