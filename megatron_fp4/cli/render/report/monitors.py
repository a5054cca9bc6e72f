"""Charts of what is watched of the model itself: experts, residual stream, zeros. The worst layers are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.cli.render.report.charts import Chart
from megatron_fp4.cli.render.report.quantization import Statistic, worst_first
from megatron_fp4.train.telemetry.monitors import health
from megatron_fp4.train.telemetry.monitors.experts import FOLDER
from megatron_fp4.train.telemetry.monitors.residuals import PREFIX
from megatron_fp4.train.telemetry.series import RunSeries

EXPERTS = (
    Statistic(
        "max_vio",
        "load of a layer's busiest expert over the mean, less 1",
        "0 where all experts get as many tokens, E/k - 1 where all tokens go to the same.",
    ),
    Statistic("dead", "experts of a layer without a token", "Since the value before.", "count"),
    Statistic(
        "entropy", "entropy of a router's shares, nats", "ln E where it is undecided. Low is bad.", low_is_bad=True
    ),
)
RESIDUAL = Statistic(
    "rms", "root mean square of the residual stream behind a block", "Whatever the block, it may grow."
)

HEALTH = (
    Statistic("underflow", "weight gradients that quantization made exactly zero", "High is bad.", "percent", 100.0),
    Statistic("structural", "weight gradients that BF16 makes zero too", "Dead channels.", "percent", 100.0),
    Statistic("scale_floor", "E4M3 scales that are zero or the smallest", "High is bad.", "percent", 100.0),
)
HEAD = Statistic("", "part of each loss in the head's gradient", "Of the norms at the logits.")


def monitor_charts(runs: Sequence[RunSeries]) -> list[Chart]:
    """A chart each, none where nothing was measured."""
    drawn = [worst_first(runs, f"{FOLDER}/{one.field}/", "", one) for one in EXPERTS]
    drawn.append(worst_first(runs, f"{PREFIX}/", f"/{RESIDUAL.field}", RESIDUAL, log=True))
    drawn += [worst_first(runs, f"{health.FOLDER}/", f"/{one.field}", one) for one in HEALTH]
    drawn.append(worst_first(runs, f"{health.HEAD}/", "", HEAD))
    return [chart for chart in drawn if chart.lines]
