"""Curves of runs: what is drawn and how; as a PNG of the losses, or as SVG elements for a page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.page import as_svg
from megatron_fp4.train.telemetry.gaps import gap_percent, mark_of, no_gap_because, set_of
from megatron_fp4.train.telemetry.series import SMOOTH_STEPS, Curve, RunSeries, matching_keys

LOSS = "loss (nats per token)"


@dataclass(frozen=True)
class Panel:
    """A plot over consumed tokens. keys: which metrics, as a regular expression."""

    title: str
    keys: str
    log: bool = False
    scale: float = 1.0


PANELS = (
    Panel("gradient norm", "grad_norm", log=True),
    Panel("parameter norm", "param_norm"),
    Panel("learning rate", "lr"),
    Panel("tokens per second: in steps, by the clock", "(wall_)?tokens_per_second"),
    Panel("part of the time since the last step that was spent in the step", "goodput"),
    Panel("model TFLOP/s per device", "tflops"),
    Panel("utilization (of BF16 peak, of mixed peak), percent", "mfu|mfu_mixed", scale=100.0),
    Panel("seconds waited for data in a step", "data_wait_seconds"),
    Panel("steps without an update, so far", "skipped_steps"),
    Panel("seconds of a save: blocking, in all", "save/blocking_seconds|save/seconds"),
    Panel("seconds of the slowest rank, by phase", "straggler/(?!waited).*/seconds"),
    Panel("seconds of the device in a step, by phase", "device/.*"),
)


def all_plots(runs: Sequence[RunSeries]) -> list[str]:
    """An SVG element for the losses, for what they differ by at equal tokens, and for each panel that has a point."""
    plots = [_svg(LOSS, partial(_draw_losses, runs=runs))]
    if len(runs) > 1:
        plots.append(_svg(f"loss against {runs[0].name}, percent", partial(_draw_gaps, runs=runs)))
    plots += [_svg(panel.title, partial(_draw_panel, runs=runs, panel=panel)) for panel in PANELS if _has(runs, panel)]
    return plots


def write_losses(runs: Sequence[RunSeries], path: Path) -> None:
    """Training and held-out loss over consumed tokens, as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(LOSS, partial(_draw_losses, runs=runs), path, size=(8, 4.5), dpi=120)


def _svg(title: str, draw: Callable[[Any], None]) -> str:
    """One figure as an SVG element."""
    return as_svg(partial(_save, title, draw, size=(6, 3.4)))


def _save(title: str, draw: Callable[[Any], None], out: Any, size: tuple[float, float], **how: Any) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": title}):
        figure, axes = plt.subplots(figsize=size)
        draw(axes)
        axes.set_title(_text(title), loc="left", fontsize=10)
        axes.set_xlabel("consumed tokens (millions)")
        axes.grid(alpha=0.3)
        labels = {line: str(line.get_label()) for line in axes.get_lines()}
        labels = {line: _text(label) for line, label in labels.items() if not re.fullmatch(r"_child\d+", label)}
        if labels:  # named one by one: by itself a legend leaves out what begins with an underscore
            axes.legend([*labels], [*labels.values()], frameon=False, fontsize=8)
        figure.tight_layout()
        figure.savefig(out, **how)
        plt.close(figure)


def _text(text: str) -> str:
    """A name as it is: between dollars it would be a formula."""
    return text.replace("$", r"\$")


def _line(axes: Any, curve: Curve, *style: str, scale: float = 1.0, **look: Any) -> None:
    axes.plot([tokens / 1e6 for tokens in curve.tokens], [scale * value for value in curve.values], *style, **look)


def _draw_losses(axes: Any, runs: Sequence[RunSeries]) -> None:
    """Where a loss is not finite the line is broken, and a dotted one stands across."""
    window = SMOOTH_STEPS * max(run.curve("loss").spacing for run in runs)
    for number, run in enumerate(runs):
        color = f"C{number}"
        loss, label = run.curve("loss"), run.name
        if run is not runs[0] and (mark := no_gap_because(run, runs[0]) or mark_of(run, runs[0], "loss")):
            label = f"{run.name} ({mark})"
        for tokens, value in zip(loss.tokens, loss.values, strict=True):
            if not math.isfinite(value):
                axes.axvline(tokens / 1e6, color=color, lw=0.8, ls=":")
        _line(axes, loss, color=color, alpha=0.2, lw=0.8)
        _line(axes, loss.smooth_over(window), color=color, lw=1.3, label=label)
        for key in matching_keys([run], "eval/.*/loss"):
            _line(axes, run.curve(key), "o", color=color, ms=4, label=f"{run.name}: {set_of(key)}")


def _draw_gaps(axes: Any, runs: Sequence[RunSeries]) -> None:
    base, *others = runs
    for number, run in enumerate(others, 1):
        if not no_gap_because(run, base):
            mark = mark_of(run, base, "loss")
            label = f"{run.name} ({mark})" if mark else run.name
            _line(axes, gap_percent(run, base), color=f"C{number}", lw=1.3, label=label)
    axes.axhline(0.0, color="#888", lw=0.8)


def _has(runs: Sequence[RunSeries], panel: Panel) -> bool:
    return any(run.curve(key).values for key in matching_keys(runs, panel.keys) for run in runs)


def _draw_panel(axes: Any, runs: Sequence[RunSeries], panel: Panel) -> None:
    keys = matching_keys(runs, panel.keys)
    for number, run in enumerate(runs):
        for index, key in enumerate(keys):
            curve = run.curve(key)
            label = run.name if len(keys) == 1 else f"{run.name}: {key}"
            style, color = "o-" if len(curve.values) < 30 else "-", f"C{number * len(keys) + index}"
            _line(axes, curve, style, scale=panel.scale, ms=3, lw=1, color=color, label=label)
    if panel.log:
        axes.set_yscale("log")
