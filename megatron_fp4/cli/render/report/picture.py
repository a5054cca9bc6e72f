"""The losses as a picture, PNG, SVG or PDF, for where a page cannot go. It shows what the page's first chart shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.report.charts import ChartLine
from megatron_fp4.cli.render.report.panels import LOSS, losses
from megatron_fp4.train.telemetry.series import RunSeries

SHAPES = "osD^v"
UNITS = {"trillions": 1e12, "billions": 1e9, "millions": 1e6, "thousands": 1e3}


def write_losses(runs: Sequence[RunSeries], path: Path) -> None:
    """Training and held-out loss over consumed tokens, the legend beside them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chart = losses(runs)
    unit, size = _unit(max(run.last_tokens for run in runs))
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": LOSS}):
        figure, axes = plt.subplots(figsize=(9, 4.5))
        drawn = [_draw(axes, line, size) for line in chart.lines]
        for run, tokens, _ in chart.broken:
            axes.axvline(tokens / size, color=f"C{run}", lw=0.8, ls=":")
        axes.set_title(LOSS, loc="left", fontsize=10)
        axes.set_xlabel(f"consumed tokens{f' ({unit})' if unit else ''}")
        axes.grid(alpha=0.3)
        named = [(one, _text(line.name)) for one, line in zip(drawn, chart.lines, strict=True) if line.style != "raw"]
        handles, names = zip(*named, strict=True)
        figure.legend(handles, names, frameon=False, fontsize=8, loc="outside right upper")
        figure.set_layout_engine("constrained")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _draw(axes: Any, line: ChartLine, size: float) -> Any:
    dots: dict[str, Any] = {"ls": "", "marker": SHAPES[line.shape % len(SHAPES)], "ms": 4}
    look = {"raw": {"alpha": 0.25, "lw": 0.8}, "trend": {"lw": 1.4}, "dots": dots}[line.style]
    points = line.points
    return axes.plot([one / size for one in points.tokens], points.values, color=f"C{line.run}", **look)[0]


def _unit(tokens: float) -> tuple[str, float]:
    """The unit in which so many tokens are a number of few digits."""
    return next(((name, size) for name, size in UNITS.items() if tokens >= size), ("", 1.0))


def _text(text: str) -> str:
    """A name as it is: between dollars it would be a formula."""
    return text.replace("$", r"\$")
