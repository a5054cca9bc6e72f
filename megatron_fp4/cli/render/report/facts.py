"""Tables of a report, as HTML: what the runs are, in what they differ, how fast they were, what happened to them."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_fp4.cli.render.comparison import changed_settings, number, tokens_text
from megatron_fp4.cli.render.report.quantization import OperandRow
from megatron_fp4.train.history.events import RunEvent, spikes_of
from megatron_fp4.train.history.launches import LaunchRecord, read_launches
from megatron_fp4.train.telemetry.goodput import goodput_of
from megatron_fp4.train.telemetry.series import RunSeries, matching_keys

BUT_FIRST = ", first steps of launches left out"
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
MEDIANS = {
    "tokens_per_second": "tokens/s",
    "step_seconds": "time of a step",
    "data_wait_seconds": "of it for data",
    "tflops": "TFLOP/s a device",
    "mfu": "of BF16 peak",
    "mfu_mixed": "of mixed peak",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are text, each with the head of its column: on a narrow screen a row becomes a few lines."""
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(_row(head, row) for row in rows)
    return f'<div class="table {kind}"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(head: Sequence[str], cells: Sequence[str]) -> str:
    named = zip(head, cells, strict=True)
    inner = "".join(f'<td data-head="{html.escape(name, quote=True)}">{html.escape(cell)}</td>' for name, cell in named)
    return f"<tr>{inner}</tr>"


def results(runs: Sequence[RunSeries]) -> str:
    """The newest losses, and medians of everything about speed."""
    losses = ["loss", *matching_keys(runs, "eval/.*/(loss|perplexity|bits_per_byte)"), "grad_norm"]
    keys = {key: key.removeprefix("eval/").replace("_", " ") for key in losses if matching_keys(runs, re.escape(key))}
    keys |= {key: f"{label} (median{BUT_FIRST})" for key, label in MEDIANS.items() if matching_keys(runs, key)}
    rows = [["step", *(f"{run.last_step:,}" for run in runs)]]
    rows.append(["tokens", *(tokens_text(run.last_tokens) for run in runs)])
    for key, label in keys.items():
        values = [run.summary(key) for run in runs]
        rows.append([label, *("" if value is None else _cell(key, value) for value in values)])
    goods = [goodput_of(run) for run in runs]
    if any(goods):
        clock = [number(good.tokens_per_second, ",.5g") if good else "" for good in goods]
        shares = [(f"{good.in_steps:.1%}", f"{good.in_first_steps:.1%}") if good else ("", "") for good in goods]
        rows.append(["tokens/s by the clock (all time since the start)", *clock])
        rows.append(["goodput (part of that time in steps)", *(whole for whole, _ in shares)])
        rows.append(["of it in the first step of each launch, which compiles", *(first for _, first in shares)])
    return table(["", *(run.name for run in runs)], rows, "values")


def _cell(key: str, value: float) -> str:
    """A value with a unit that fits its size."""
    if key.endswith("_seconds"):
        unit, size = next((one for one in UNITS if value >= one[1]), UNITS[-1])
        return f"{number(value / size, '.3g')} {unit}"
    if key.startswith("mfu"):
        return number(100 * value, ".1f") + " %"
    return number(value, ",.5g")


def what_they_are(runs: Sequence[RunSeries]) -> str:
    """Model, layout, precision, date, machine and command of each run, as far as it is known."""
    facts = [_facts(run) for run in runs]
    labels = dict.fromkeys(label for one in facts for label in one)
    rows = [[label, *(one.get(label, "") for one in facts)] for label in labels]
    return table(["", *(run.name for run in runs)], rows, "facts")


def commands(run: RunSeries) -> str:
    """The commands by which a run was launched, each once; empty where it kept no record of them."""
    lines = dict.fromkeys(launch.command for launch in read_launches(run.folder))
    text = "".join(f"<pre>{html.escape(line)}</pre>" for line in lines)
    return f"<details><summary>Commands of {html.escape(run.name)}</summary>{text}</details>" if text else ""


def settings(runs: Sequence[RunSeries]) -> str:
    """The settings that differ; empty where none does."""
    rows = changed_settings(runs)
    return table(["setting", *(run.name for run in runs)], rows, "facts") if rows else ""


def history(runs: Sequence[RunSeries], events: Sequence[Sequence[RunEvent]]) -> str:
    """What happened to the runs on the way; empty for runs that nothing happened to."""
    rows = [
        [run.name, f"{event.step:,}", tokens_text(event.tokens), event.text]
        for run, of_run in zip(runs, events, strict=True)
        for event in of_run
    ]
    return table(["run", "after step", "tokens", "what"], rows) if rows else ""


def spikes(run: RunSeries) -> str:
    """What was done about loss spikes, if anything."""
    rows = [
        [
            str(entry["step"]),
            str(entry.get("action", "")),
            ", ".join(_value(*item) for item in entry.items() if item[0] not in ("step", "action")),
        ]
        for entry in spikes_of(run)
    ]
    return f"<h2>Loss spikes of {html.escape(run.name)}</h2>" + table(["step", "action", ""], rows) if rows else ""


def operands(runs: Sequence[RunSeries], rows: Sequence[OperandRow]) -> str:
    """Every quantized operand, worst first; a click draws its line (page.js), which `data-line` names."""
    head = ["run", "operand", "SNR now, dB", "worst", "underflow now, %", "worst", "saturation now, %", "worst"]
    body = []
    for row in rows:
        cells = [runs[row.run].name, row.name, *(f"{value:.4g}" for pair in row.values for value in pair)]
        name = html.escape(f"{runs[row.run].name}: {row.name}", quote=True)
        body.append(f'<tr data-line="{name}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    header = "".join(f"<th>{cell}</th>" for cell in head)
    inner = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    summary = f"<summary>All {len(rows)} quantized operands, worst first; click one to draw it above</summary>"
    return f'<details>{summary}<div class="table operands">{inner}</div></details>'


def _facts(run: RunSeries) -> dict[str, str]:
    config: Mapping[str, Any] = run.settings or {}
    launches = read_launches(run.folder)
    model, layout = config.get("model") or {}, config.get("parallel") or {}
    train, data = config.get("train") or {}, config.get("data") or {}
    facts = {}
    if model:
        parts = [model.get("pattern") or f"GPT, {model.get('num_layers')} layers", f"hidden {model.get('hidden')}"]
        parts += [f"{model.get('num_heads')} heads", f"vocabulary {model.get('vocab_size'):,}"]
        parts += [f"{launches[-1].parameters:,} parameters"] if launches else []
        facts["model"] = ", ".join(parts)
    if layout:
        axes = ("tp", "pp", "cp", "dp", *(("ep",) if layout.get("ep", 1) > 1 else ()))
        facts["layout"] = ", ".join(f"{axis} {layout.get(axis) or 'auto'}" for axis in axes)
    if train and data:
        facts["batch"] = f"{train.get('global_batch')} samples of {data.get('seq_length')} tokens"
        facts["tokens planned"] = tokens_text(float(train.get("total_tokens") or 0))
    if precision := config.get("precision"):
        facts["precision"] = f"{precision.get('use') or 'by rules'}, backend {precision.get('backend')}"
    return facts | _times(run) | (_launched(launches) if launches else {}) | {"folder": str(run.folder)}


def _times(run: RunSeries) -> dict[str, str]:
    """First and last moment that the records have."""
    times = [values["wall_time"] for values in run.steps.values() if "wall_time" in values]
    texts = [time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(one)) for one in (times[:1] + times[-1:])]
    return {"from, to": ", ".join(texts)} if texts else {}


def _launched(launches: Sequence[LaunchRecord]) -> dict[str, str]:
    newest = launches[-1]
    return {
        "launches": str(len(launches)),
        "machine": f"{newest.ranks} rank{'s' if newest.ranks > 1 else ''}, {newest.device}",
        "versions": ", ".join(f"{name} {version}" for name, version in newest.versions.items() if version != "None"),
    }


def _value(key: str, value: Any) -> str:
    return f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
