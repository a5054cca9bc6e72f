"""The page: words, tables, charts as data, and the script that draws them, all in one file that loads nothing.

A content security policy in its head forbids the browser any request, so that a page which comes by mail, or lies on a
cluster without a network, is known to be whole.

Not here: the PNG of the losses (../plots.py).
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_fp4.cli.render.page import page, write_text
from megatron_fp4.cli.render.plan_plot import plan_plots
from megatron_fp4.cli.render.report import facts
from megatron_fp4.cli.render.report.charts import Chart
from megatron_fp4.cli.render.report.monitors import monitor_charts
from megatron_fp4.cli.render.report.panels import charts
from megatron_fp4.cli.render.report.quantization import operand_rows, quantization_charts
from megatron_fp4.cli.render.report.words import in_words
from megatron_fp4.train.history.events import RunEvent, events_of
from megatron_fp4.train.telemetry.series import RunSeries

PLAN_FILE = "plan.json"
"""In a run's directory: what `megatron-fp4 plan --json` printed."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HINT = (
    "Drag across a plot to zoom, double-click to go back; a click on a name hides its line. Runs hidden here are hidden"
    " in all plots."
)


def write_report(runs: Sequence[RunSeries], path: Path) -> None:
    """Write the page; runs after the first are compared with it. Raises ValueError for a plan that is none."""
    base, *others = [run.name for run in runs]
    title = f"{', '.join(others)} against {base}" if others else f"run {base}"
    events = [events_of(run) for run in runs]
    drawn, quantized = [*charts(runs), *monitor_charts(runs)], quantization_charts(runs)
    differing, happened = facts.settings(runs), facts.history(runs, events)
    rows = operand_rows(runs) if quantized else []
    body = [
        f'<section class="words">{"".join(map(_paragraph, in_words(runs, events)))}</section>',
        *([f"<h2>Settings that differ</h2>{differing}"] if differing else []),
        f"<h2>Results</h2>{facts.results(runs)}",
        f'<h2 id="curves">Curves</h2><div id="bar"></div><p class="note">{HINT}</p><noscript><p>Plots need JavaScript;'
        " <code>megatron-fp4 report RUN --plot loss.png</code> makes a picture.</p></noscript>",
        _places(drawn, 0),
        *([f'<h2 id="quantization">Quantization</h2>{_places(quantized, len(drawn))}'] if quantized else []),
        *([facts.operands(runs, rows)] if quantized else []),
        *([f"<h2>What happened on the way</h2>{happened}"] if happened else []),
        f"<h2>What the runs are</h2>{facts.what_they_are(runs)}{''.join(map(facts.commands, runs))}",
        *(text for run in runs if (text := facts.spikes(run))),
        *(text for run in runs if (text := _plan(run))),
        f'<script type="application/json" id="data">{_data(runs, events, [*drawn, *quantized])}</script>',
        f"<script>{_asset('uPlot.iife.min.js')}</script><script>{_asset('page.js')}</script>",
    ]
    head = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    style = _asset("uPlot.min.css") + _asset("page.css")
    write_text(page(title, body, head=head, style=style), path)


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _places(drawn: Sequence[Chart], first: int) -> str:
    """Where page.js puts the charts, the number `first` and those that follow."""
    places = (
        f'<figure class="chart{" wide" if chart.wide else ""}" data-chart="{number}"></figure>'
        for number, chart in enumerate(drawn, first)
    )
    return f'<div class="charts">{"".join(places)}</div>'


def _data(runs: Sequence[RunSeries], events: Sequence[Sequence[RunEvent]], drawn: Sequence[Chart]) -> str:
    """What page.js reads. No `<` stands in it, so that nothing in a name can end the element."""
    marks: list[dict[str, Any]] = [
        {"run": number, "kind": event.kind.value, "s": event.step, "t": event.tokens, "text": event.text}
        for number, of_run in enumerate(events)
        for event in of_run
    ]
    data = {"runs": [run.name for run in runs], "marks": marks, "charts": [chart.json() for chart in drawn]}
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


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
