"""Runs side by side as text: first the settings in which they differ, then what a reader must know, then the numbers.

Every gap is to the first run, at the last consumed tokens that both have (train/telemetry/gaps.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fp4.train.resume.differences import ABSENT, around_first_difference, compare_settings
from megatron_fp4.train.telemetry.gaps import changed_data, comparable_keys, last_gap, mark_of, no_gap_because, set_of
from megatron_fp4.train.telemetry.goodput import goodput_of
from megatron_fp4.train.telemetry.series import RunSeries, matching_keys

MAX_CELL = 40
CONTEXT = 8


def stored_settings(run_dir: Path) -> Mapping[str, Any] | None:
    """What the config.yaml of a run holds, also of a version with other settings. None where there is none.

    Raises ValueError if it cannot be read.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return None
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}; mend it, or move it away") from None
    if not _is_of_a_run(settings):
        raise ValueError(f"{path} does not hold the settings of a run, in sections; mend it, or move it away")
    return cast("Mapping[str, Any]", settings)


def _is_of_a_run(settings: Any) -> bool:
    """Whether settings have the form that a comparison reads: sections, and lists of them in `data`."""
    data = settings.get("data") or {} if isinstance(settings, dict) else None
    lists = [data.get(name) or [] for name in ("sources", "evaluation")] if isinstance(data, dict) else [[None]]
    return all(isinstance(items, list) and all(isinstance(item, dict) for item in items) for items in lists)


def comparison(runs: Sequence[RunSeries]) -> str:
    """All of it, for one run or several."""
    return "\n".join([*differing_settings(runs), *notes(runs), *summary(runs)])


def differing_settings(runs: Sequence[RunSeries]) -> list[str]:
    """A table with a row for each setting in which a run differs from the first; empty if none does."""
    rows = changed_settings(runs)
    if not rows:
        return []
    table = [["settings that differ", *(run.name for run in runs)], *([f"  {key}", *cells] for key, *cells in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def changed_settings(runs: Sequence[RunSeries]) -> list[list[str]]:
    """A row for each setting in which a run differs from the first: its key and its values, long ones cut."""
    base, *others = runs
    rows: dict[str, dict[str, Any]] = {}
    for run in others:
        if base.settings is not None and run.settings is not None:
            for one in compare_settings(base.settings, run.settings):
                rows.setdefault(one.key, {base.name: one.saved})[run.name] = one.configured
    table = []
    for key, values in _joined_recipes(rows).items():
        cells = [values.get(run.name, values[base.name] if run.settings is not None else "?") for run in runs]
        table.append([key, *_cells(cells)])
    return table


def _joined_recipes(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows; those of a recipe, or of an entry of a list, that one side does not have at all, as one row."""
    joined: dict[str, dict[str, Any]] = {}
    for key, values in rows.items():
        name, of = _element(key)
        of_element = [row for one, row in rows.items() if one.startswith(f"{name}.")]
        if name and all(ABSENT in row.values() for row in of_element):
            present = {run: value if value == ABSENT else of for run, value in values.items()}
            joined.setdefault(name, present).update(present)
        else:
            joined[key] = values
    return joined


def _element(key: str) -> tuple[str, str]:
    """The recipe, or the entry of a list, to which a setting belongs, and what to call it; "" for none."""
    if recipe := re.match(r"(precision\.recipes\.[^.]+)\.", key):
        return recipe[1], "(a recipe)"
    entry = re.match(r"(.*?\.\d+)\.", key)
    return (entry[1], "(an entry)") if entry else ("", "")


def _cells(values: Sequence[Any]) -> list[str]:
    """The values as text; of long ones the part from a little before the first difference on."""
    texts = [value if isinstance(value, str) and value else repr(value) for value in values]
    return around_first_difference(texts, MAX_CELL, CONTEXT)


def notes(runs: Sequence[RunSeries]) -> list[str]:
    """Where a comparison with the first run means less than it seems to, a line each."""
    base, *others = runs
    unknown = [run.name for run in runs if run.settings is None] if others else []
    lines = [f"note: {name} has no config.yaml, so its settings are not compared" for name in unknown]
    for run in others:
        pair = f"{run.name} and {base.name}"
        if reason := no_gap_because(run, base):
            lines.append(f"note: {pair} are not compared, {reason}")
        elif changed := changed_data(run, base):
            lines.append(f"note: {pair} were trained on other data ({', '.join(changed)}): their gap says little")
    return lines


def summary(runs: Sequence[RunSeries]) -> list[str]:
    """Per run: training loss, every held-out loss, each with its gap to the first run, and the speed."""
    labels = {"loss": "training loss"}
    labels |= {key: key for key in matching_keys(runs, "eval/.*/loss")}
    if any(no_gap_because(run, runs[0]) for run in runs):  # then it is all that compares
        labels |= {key: key for key in matching_keys(runs, "eval/.*/bits_per_byte")}
    width = max(12, *(len(run.name) for run in runs))
    lines = []
    for run in runs:
        for key, label in labels.items():
            value = run.summary(key)
            if value is not None:
                label += f" ({mean_of(run)})" if key == "loss" else ""
                text = f"{run.name:<{width}} step {run.last_step:>6}  {label:<44} {number(value)}{_beside(run, key)}"
                lines.append(f"{text}{_not_finite(run, key)}{_gap(run, runs[0], key)}")
        if speed := _speed(run):
            lines.append(f"{run.name:<{width}} {speed}")
    return lines


def mean_of(run: RunSeries) -> str:
    """`mean of the last 20 steps`: what the training loss in a table is; of a short run fewer."""
    return f"mean of the last {run.num_smoothed} steps" if run.num_smoothed > 1 else "of the last step alone"


def other_forms(run: RunSeries, name: str) -> list[str]:
    """The loss on a held-out set as perplexity, and in bits per byte where the bytes are known."""
    perplexity, bits = (run.summary(f"eval/{name}/{metric}") for metric in ("perplexity", "bits_per_byte"))
    texts = [] if perplexity is None else [f"perplexity {number(perplexity, '.4g')}"]
    return texts if bits is None else [*texts, f"{number(bits)} bits per byte"]


def _beside(run: RunSeries, key: str) -> str:
    forms = other_forms(run, set_of(key)) if re.fullmatch("eval/.*/loss", key) else []
    return f" ({', '.join(forms)})" if forms else ""


def number(value: float, how: str = ".4f") -> str:
    """A number as text; NaN as people write it."""
    return format(value, how) if value == value else "NaN"


def tokens_text(tokens: float) -> str:
    """`512,000`, `30.00 M`, `1.20 B`, `10.00 T`."""
    for name, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if tokens >= size:
            return f"{tokens / size:,.2f} {name}"
    return f"{tokens:,.0f}"


def _not_finite(run: RunSeries, key: str) -> str:
    steps = run.not_finite(key)
    if not steps:
        return ""
    return f" (NaN or infinite in {len(steps)} step(s), the last {steps[-1]})"


def _gap(run: RunSeries, base: RunSeries, key: str) -> str:
    if run is base or not base.curve(key).values:
        return ""
    if (reason := no_gap_because(run, base)) and key not in comparable_keys(run, base):
        return f"   no gap: {reason}"
    gap = last_gap(run, base, key)
    if gap is None:
        return f"   no gap: no tokens that {base.name} has too"
    marks = ["interpolated"] if gap.interpolated and key != "loss" else []
    marks += ["steps of another size"] if gap.other_steps and key == "loss" else []
    marks += [mark] if (mark := mark_of(run, base, key)) else []
    text = f"   {number(gap.percent, '+.2f')}% against {base.name} at {tokens_text(gap.tokens)} tokens"
    return text + (f" ({', '.join(marks)})" if marks else "")


def _speed(run: RunSeries) -> str:
    """`1,912 tokens/s in the median step; 1,650 by the clock; goodput 86% (...)`."""
    rate, good = run.summary("tokens_per_second"), goodput_of(run)
    if rate is None:
        return ""
    text = f"{number(rate, ',.0f')} tokens/s in the median step"
    if mfu := run.summary("mfu"):
        text += f", MFU {mfu:.1%}"
    if good is None:
        return text
    most = good.in_first_steps > good.in_steps / 2
    firsts = f"of it {good.in_first_steps:.1%} in the first step of a launch, which compiles; " if most else ""
    return (
        f"{text}; {good.tokens_per_second:,.0f} by the clock, goodput {good.in_steps:.1%} ({firsts}evaluation, saves,"
        f" logging, start-up {good.beside_steps:.1%}; between launches, or made again {good.between_launches:.1%})"
    )
