"""A run, or several against the first, as one HTML file that can be mailed: no script, no link, plots inside as SVG."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.comparison import comparison, number
from megatron_fp4.cli.render.page import write_page
from megatron_fp4.cli.render.plan_plot import plan_plots
from megatron_fp4.cli.render.plots import all_plots
from megatron_fp4.storage.append import read_values
from megatron_fp4.train.faults.guard import SPIKE_LOG
from megatron_fp4.train.telemetry.series import SMOOTH_STEPS, RunSeries, matching_keys

PLAN_FILE = "plan.json"
"""In a run's directory: what `megatron-fp4 plan --json` printed."""
RATE_COLUMNS = ("tokens_per_second", "wall_tokens_per_second", "tflops", "mfu")


def write_html(runs: Sequence[RunSeries], path: Path) -> None:
    """Write the page; runs after the first are compared with it."""
    names = [run.name for run in runs]
    title = " against ".join(reversed(names)) if len(runs) > 1 else f"run {names[0]}"
    note = (
        f"Lines of the loss are means of {SMOOTH_STEPS} steps (of the run with the largest, and of as many tokens of"
        f" the others), dots are held-out losses; a dotted line is a step whose"
        f" loss is not finite. Rates in the table are medians of all steps, the gradient norm is that of the last"
        f" {SMOOTH_STEPS}. Gaps are at equal consumed tokens."
    )
    body = [
        f"<pre>{html.escape(comparison(runs))}</pre>",
        _table(runs),
        '<div class="plots">',
        *all_plots(runs),
        "</div>",
        *(text for run in runs if (text := _spikes(run))),
        *(text for run in runs if (text := _plan(run))),
        f'<p class="note">{note}</p>',
    ]
    write_page(title, body, path)


def _table(runs: Sequence[RunSeries]) -> str:
    """Last step, and what stands for each metric, per run."""
    evaluations = matching_keys(runs, "eval/.*/loss")
    keys = ["loss", *evaluations, "grad_norm", *RATE_COLUMNS, "skipped_steps"]
    keys = [key for key in keys if matching_keys(runs, re.escape(key))]
    rows = ["<tr><th>run</th><th>step</th>" + "".join(f"<th>{html.escape(key)}</th>" for key in keys) + "</tr>"]
    for run in runs:
        values = [run.summary(key) for key in keys]
        cells = [html.escape(run.name), str(run.last_step), *("" if v is None else number(v, ",.4g") for v in values)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _spikes(run: RunSeries) -> str:
    """What was done about loss spikes, if anything."""
    path = run.folder / SPIKE_LOG
    if not path.exists():
        return ""
    entries = list(read_values(path))
    rows = [
        f"<tr><td>{entry['step']}</td><td>{html.escape(str(entry.get('action', '')))}</td><td>"
        + html.escape(", ".join(_value(*item) for item in entry.items() if item[0] not in ("step", "action")))
        + "</td></tr>"
        for entry in entries
    ]
    head = "<tr><th>step</th><th>action</th><th></th></tr>"
    return f"<h2>Loss spikes of {html.escape(run.name)}</h2><table>{head}{''.join(rows)}</table>"


def _plan(run: RunSeries) -> str:
    """The pictures of the plan that was put into the run's directory, if one was."""
    path = run.folder / PLAN_FILE
    if not path.exists():
        return ""
    try:
        plots = plan_plots(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(f"{path} is not what `megatron-fp4 plan --json` prints; remove it, or plan again") from None
    return f'<h2>The plan of {html.escape(run.name)}</h2><div class="plots">{"".join(plots)}</div>'


def _value(key: str, value: Any) -> str:
    return f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
