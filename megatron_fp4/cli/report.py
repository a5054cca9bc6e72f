"""`megatron-fp4 report RUN [RUN ...] --html out.html`: the curves of one run, or several against the first.

`--html` writes one page with all plots (report_html.py), `--plot` only the loss curves as a PNG.

`--equal FIRST LAST` compares the losses and gradient norms of those steps bit for bit and fails if any differs: the
proof that a resumed run and an uninterrupted one are the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.html import write_html
from megatron_fp4.train.telemetry.metrics import read_metrics

Series = dict[int, dict[str, Any]]


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 if `--equal` finds a difference, 2 for a run without metrics."""
    parser = argparse.ArgumentParser(prog="megatron-fp4 report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories (train.run_dir)")
    parser.add_argument("--plot", type=Path, help="write the loss curves to this PNG")
    parser.add_argument("--html", type=Path, help="write a page with all plots, one self-contained file")
    parser.add_argument("--equal", nargs=2, type=int, metavar=("FIRST", "LAST"))
    args = parser.parse_args(arguments)
    runs = {run.name: by_step(run) for run in args.runs}
    for name, series in runs.items():
        if not series:
            print(f"error: run {name} has no metrics.jsonl with complete records", file=sys.stderr)
            return 2
    if args.equal:
        return compare_bits(runs, *args.equal)
    print(summary(runs))
    if args.plot:
        plot(runs, args.plot)
        print(f"loss curves: {args.plot}")
    if args.html:
        write_html(runs, {run.name: run for run in args.runs}, args.html)
        print(f"report: {args.html}")
    return 0


def by_step(run: Path) -> Series:
    """All values of a run by step."""
    series: Series = {}
    for record in read_metrics(run):
        series.setdefault(record["step"], {}).update(record)
    return series


def evaluation_keys(runs: dict[str, Series]) -> list[str]:
    keys = {key for series in runs.values() for values in series.values() for key in values if key.startswith("eval/")}
    return sorted(keys)


def summary(runs: dict[str, Series]) -> str:
    """Last training loss and every held-out loss per run, with the gap to the first run in percent."""
    lines = []
    first: dict[str, float] = {}
    for name, series in runs.items():
        last_step = max(series)
        losses = {"training loss (mean of the last 20 steps)": _tail_mean(series)}
        for key in evaluation_keys(runs):
            values = [series[step][key] for step in sorted(series) if key in series[step]]
            if values:
                losses[key] = values[-1]
        for key, value in losses.items():
            base = first.setdefault(key, value)
            gap = "" if value is base else f"   {100 * (value - base) / base:+.2f}% against {next(iter(runs))}"
            lines.append(f"{name:<12} step {last_step:>6}  {key:<44} {value:.4f}{gap}")
    return "\n".join(lines)


def _tail_mean(series: Series) -> float:
    losses = [series[step]["loss"] for step in sorted(series) if "loss" in series[step]][-20:]
    return sum(losses) / len(losses)


def compare_bits(runs: dict[str, Series], first: int, last: int) -> int:
    """Compare loss and gradient norm of steps first..last of two runs."""
    (a_name, a), (b_name, b) = runs.items()
    different = [
        f"step {step}: {key} {a.get(step, {}).get(key)} in {a_name}, {b.get(step, {}).get(key)} in {b_name}"
        for step in range(first, last + 1)
        for key in ("loss", "grad_norm")
        if key not in a.get(step, {}) or a[step][key] != b.get(step, {}).get(key)
    ]
    if different:
        print(f"{len(different)} numbers differ; the first: {different[0]}", file=sys.stderr)
        return 1
    print(f"steps {first} to {last}: loss and gradient norm of {a_name} and {b_name} are equal, bit for bit")
    return 0


def plot(runs: dict[str, Series], path: Path) -> None:
    """Training and held-out loss over consumed tokens, one colour per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for number, (name, series) in enumerate(runs.items()):
        color = f"C{number}"
        steps = [step for step in sorted(series) if "loss" in series[step]]
        tokens = [series[step]["consumed_tokens"] / 1e6 for step in steps]
        axes.plot(
            tokens, [series[step]["loss"] for step in steps], color=color, alpha=0.6, lw=1, label=f"{name}: training"
        )
        for key in evaluation_keys(runs):
            points = [step for step in steps if key in series[step]]
            axes.plot(
                [series[step]["consumed_tokens"] / 1e6 for step in points],
                [series[step][key] for step in points],
                color=color,
                marker="o",
                ls="none",
                label=f"{name}: {key}",
            )
    axes.set_xlabel("consumed tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
