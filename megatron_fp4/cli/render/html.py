"""A run, or several against the first, as one HTML file that can be mailed: no script, no link, plots inside as SVG."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.comparison import comparison, number
from megatron_fp4.cli.render.plots import all_plots
from megatron_fp4.storage.append import read_values
from megatron_fp4.train.faults.guard import SPIKE_LOG
from megatron_fp4.train.telemetry.series import SMOOTH_STEPS, RunSeries, matching_keys

RATE_COLUMNS = ("tokens_per_second", "wall_tokens_per_second", "tflops", "mfu")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.1em; margin: 2em 0 .4em; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 12px; }
.plots svg { width: 100%; height: auto; }
pre { font-size: 12px; overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 2px 14px 2px 0; text-align: left; border-bottom: 1px solid #ddd; }
td { font-variant-numeric: tabular-nums; } .note { color: #666; }
"""


def write_html(runs: Sequence[RunSeries], path: Path) -> None:
    """Write the page; runs after the first are compared with it."""
    names = [run.name for run in runs]
    title = html.escape(" against ".join(reversed(names)) if len(runs) > 1 else f"run {names[0]}")
    note = (
        f"Lines of the loss are means of {SMOOTH_STEPS} steps (of the run with the largest, and of as many tokens of"
        f" the others), dots are held-out losses; a dotted line is a step whose"
        f" loss is not finite. Rates in the table are medians of all steps, the gradient norm is that of the last"
        f" {SMOOTH_STEPS}. Gaps are at equal consumed tokens."
    )
    body = [
        f"<h1>{title}</h1>",
        f"<pre>{html.escape(comparison(runs))}</pre>",
        _table(runs),
        '<div class="plots">',
        *all_plots(runs),
        "</div>",
        *(text for run in runs if (text := _spikes(run))),
        f'<p class="note">{note}</p>',
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n", encoding="utf-8")


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


def _value(key: str, value: Any) -> str:
    return f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
