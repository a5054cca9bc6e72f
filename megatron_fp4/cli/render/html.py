"""A run, or several against the first, as one HTML file that can be mailed: no script, no link, plots inside as SVG."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.train.faults.guard import SPIKE_LOG

Series = dict[int, dict[str, Any]]
SMOOTH_STEPS = 20

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 2em 0 .4em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 12px; }
.plots svg { width: 100%; height: auto; }
table { border-collapse: collapse; }
th, td { padding: 2px 14px 2px 0; text-align: left; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; } .note { color: #666; }
"""


@dataclass(frozen=True)
class Panel:
    """A plot over consumed tokens. keys: which metrics, as a pattern."""

    title: str
    keys: str
    log: bool = False
    scale: float = 1.0


PANELS = (
    Panel("gradient norm", "grad_norm", log=True),
    Panel("parameter norm", "param_norm"),
    Panel("learning rate", "lr"),
    Panel("tokens per second", "tokens_per_second"),
    Panel("model TFLOP/s per device", "tflops"),
    Panel("utilization (of BF16 peak, of mixed peak), percent", "mfu|mfu_mixed", scale=100.0),
    Panel("seconds waited for data in a step", "data_wait_seconds"),
    Panel("steps without an update, so far", "skipped_steps"),
    Panel("seconds of a save: blocking, in all", "save/blocking_seconds|save/seconds"),
    Panel("seconds of the slowest rank, by phase", "straggler/(?!waited).*/seconds"),
)


def write_html(runs: Mapping[str, Series], folders: Mapping[str, Path], path: Path) -> None:
    """Write the page. runs: values by step, the others compared with the first. folders: run directories."""
    plots = [_plot("loss (nats per token)", lambda axes: _draw_losses(axes, runs))]
    if len(runs) > 1:
        plots.append(_plot(f"loss against {next(iter(runs))}, percent", lambda axes: _draw_gaps(axes, runs)))
    plots += [_plot(panel.title, lambda axes, p=panel: _draw(axes, runs, p)) for panel in PANELS if _has(runs, panel)]  # type: ignore[misc]
    title = html.escape(" against ".join(reversed(list(runs))) if len(runs) > 1 else f"run {next(iter(runs))}")
    body = [f"<h1>{title}</h1>", _table(runs), '<div class="plots">', *plots, "</div>"]
    body += [text for name, folder in folders.items() if (text := _spikes(name, folder))]
    body.append(f'<p class="note">Lines of the loss are means of {SMOOTH_STEPS} steps, dots are held-out losses.</p>')
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n")


def _points(series: Series, key: str) -> tuple[list[float], list[float]]:
    """(millions of tokens, values) of a metric where it is finite; tokens as of the nearest step before."""
    tokens, xs, ys = 0.0, [], []
    for step in sorted(series):
        values = series[step]
        tokens = values.get("consumed_tokens", tokens)
        if isinstance(values.get(key), int | float):
            xs.append(tokens / 1e6)
            ys.append(float(values[key]))
    return xs, ys


def _smooth(values: list[float]) -> list[float]:
    """Means of the last SMOOTH_STEPS values."""
    return [
        sum(part) / len(part) for end in range(1, len(values) + 1) if (part := values[max(0, end - SMOOTH_STEPS) : end])
    ]


def _keys(runs: Mapping[str, Series], pattern: str) -> list[str]:
    found = {key for series in runs.values() for values in series.values() for key in values}
    return sorted(key for key in found if re.fullmatch(pattern, key))


def _has(runs: Mapping[str, Series], panel: Panel) -> bool:
    return any(_points(series, key)[0] for key in _keys(runs, panel.keys) for series in runs.values())


def _plot(title: str, draw: Callable[[Any], None]) -> str:
    """One figure as an SVG element."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "font.size": 9, "svg.hashsalt": title}):
        figure, axes = plt.subplots(figsize=(6, 3.4))
        draw(axes)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("consumed tokens (millions)")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    text = out.getvalue()
    return f"<figure style='margin:0'>{text[text.index('<svg') :]}</figure>"


def _draw_losses(axes: Any, runs: Mapping[str, Series]) -> None:
    for number, (name, series) in enumerate(runs.items()):
        xs, ys = _points(series, "loss")
        axes.plot(xs, ys, color=f"C{number}", alpha=0.2, lw=0.8)
        axes.plot(xs, _smooth(ys), color=f"C{number}", lw=1.3, label=name)
        for key in _keys({name: series}, "eval/.*/loss"):
            axes.plot(*_points(series, key), "o", color=f"C{number}", ms=4, label=f"{name}: {key.split('/')[1]}")


def _draw_gaps(axes: Any, runs: Mapping[str, Series]) -> None:
    """Difference of smoothed losses at equal steps."""
    (_, base), *others = runs.items()
    for number, (name, series) in enumerate(others, 1):
        steps = [step for step in sorted(series) if "loss" in series[step] and "loss" in base.get(step, {})]
        ours, theirs = (_smooth([float(of[step]["loss"]) for step in steps]) for of in (series, base))
        tokens = [series[step]["consumed_tokens"] / 1e6 for step in steps]
        gaps = [100 * (a - b) / b for a, b in zip(ours, theirs, strict=True)]
        axes.plot(tokens, gaps, color=f"C{number}", lw=1.3, label=name)
    axes.axhline(0.0, color="#888", lw=0.8)


def _draw(axes: Any, runs: Mapping[str, Series], panel: Panel) -> None:
    keys = _keys(runs, panel.keys)
    for number, (name, series) in enumerate(runs.items()):
        for index, key in enumerate(keys):
            xs, ys = _points(series, key)
            label = name if len(keys) == 1 else f"{name}: {key}"
            style = "o-" if len(xs) < 30 else "-"
            ys = [panel.scale * y for y in ys]
            axes.plot(xs, ys, style, ms=3, lw=1, color=f"C{number * len(keys) + index}", label=label)
    if panel.log:
        axes.set_yscale("log")


def _table(runs: Mapping[str, Series]) -> str:
    """Last step and last values per run."""
    keys = ["loss", *_keys(runs, "eval/.*/loss"), "grad_norm", "tokens_per_second", "tflops", "mfu", "skipped_steps"]
    keys = [key for key in keys if _keys(runs, re.escape(key))]
    rows = ["<tr><th>run</th><th>step</th>" + "".join(f"<th>{html.escape(key)}</th>" for key in keys) + "</tr>"]
    for name, series in runs.items():
        cells = [html.escape(name), str(max(series))]
        for key in keys:
            values = _points(series, key)[1]
            if key == "loss":
                values = _smooth(values)
            cells.append(f"{values[-1]:,.4g}" if values else "")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _value(key: str, value: Any) -> str:
    return f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"


def _spikes(name: str, folder: Path) -> str:
    """What was done about loss spikes, if anything."""
    path = folder / SPIKE_LOG
    if not path.exists():
        return ""
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    rows = [
        f"<tr><td>{entry['step']}</td><td>{html.escape(entry['action'])}</td><td>"
        + html.escape(", ".join(_value(*item) for item in entry.items() if item[0] not in ("step", "action")))
        + "</td></tr>"
        for entry in entries
    ]
    head = "<tr><th>step</th><th>action</th><th></th></tr>"
    return f"<h2>Loss spikes of {html.escape(name)}</h2><table>{head}{''.join(rows)}</table>"
