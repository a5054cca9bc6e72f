"""Two runs side by side: what they differ by at equal consumed tokens, and whether that means anything.

Equal tokens, not equal steps, and only tokens that both runs have: with another batch size a step is another amount of
training, and a run that is half finished is compared with the first half of the other. Losses are nats per token, so
between tokenizers there is no gap at all; where only the text differs, the gap is shown with a mark.

Not here: settings that differ otherwise (cli/render/comparison.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.train.telemetry.series import Curve, RunSeries, matching_keys

NOT_DATA = ("tokenizer", "evaluation", "tasks", "prefetch_batches", "index_cache")
"""Settings of `data` that do not say which text is trained on."""


@dataclass(frozen=True)
class Gap:
    """Difference of a loss to another run's, in percent, at `tokens` consumed by both.

    interpolated: one of the two has no value there, only before and after. other_steps: one of the two has more values
    up to there than the other, of which the gap takes as many: the training loss is then noisier.
    """

    tokens: float
    percent: float
    interpolated: bool
    other_steps: bool


def gap_percent(run: RunSeries, base: RunSeries, key: str = "loss") -> Curve:
    """Difference of a loss to that of `base` at equal consumed tokens, in percent of `base`; empty if none are equal.

    The points are those of the run that has fewer in the common range, where the other lies between its own; of a
    held-out loss only those that both have, if there are any. The training loss is the mean of SMOOTH_STEPS points.
    """
    curves = [one.curve(key) for one in (run, base)]
    tokens = _common_tokens(*curves, exact=key != "loss")
    ours, theirs = (curve.at(tokens) for curve in curves)
    if key == "loss":
        ours, theirs = ours.smooth(), theirs.smooth()
    pairs = zip(ours.values, theirs.values, strict=True)
    return Curve(tokens, [100 * (a - b) / b if b else math.nan for a, b in pairs])


def last_gap(run: RunSeries, base: RunSeries, key: str) -> Gap | None:
    """The gap at the last tokens that both have; None where they have none in common."""
    gaps = gap_percent(run, base, key)
    if not gaps.tokens:
        return None
    tokens = gaps.tokens[-1]
    both = [one.curve(key).tokens for one in (run, base)]
    counts = {sum(gaps.tokens[0] <= one <= tokens for one in of_run) for of_run in both}
    return Gap(tokens, gaps.values[-1], not all(tokens in of_run for of_run in both), len(counts) > 1)


def _common_tokens(ours: Curve, theirs: Curve, *, exact: bool) -> list[float]:
    if not (ours.tokens and theirs.tokens):
        return []
    first, last = max(ours.tokens[0], theirs.tokens[0]), min(ours.tokens[-1], theirs.tokens[-1])
    inside = [[one for one in curve.tokens if first <= one <= last] for curve in (ours, theirs)]
    equal = sorted(set(inside[0]) & set(inside[1]))
    return equal if exact and equal else min(filter(None, inside), key=len, default=[])


def no_gap_because(run: RunSeries, base: RunSeries) -> str:
    """Why losses of the two cannot be compared, "" where they can: they count other tokens."""
    if run.data and base.data and run.data.tokenizers and base.data.tokenizers:
        same = run.data.tokenizers == base.data.tokenizers
    else:
        files = [str(_data_settings(one).get("tokenizer") or "") for one in (run, base)]
        same = not all(files) or _same_file(*files)
    return "" if same else "other tokenizer: nats per token do not compare"


def comparable_keys(run: RunSeries, base: RunSeries) -> list[str]:
    """The losses whose gap means something: between tokenizers only those per byte of text."""
    if no_gap_because(run, base):
        return matching_keys([run, base], "eval/.*/bits_per_byte")
    return ["loss", *matching_keys([run, base], "eval/.*/loss")]


def mark_of(run: RunSeries, base: RunSeries, key: str) -> str:
    """What stands beside a gap of two losses that are not of the same text; "" where they are, or nothing is known."""
    if key == "loss":
        return "other data" if changed_data(run, base) else ""
    if no_gap_because(run, base):
        return "other tokenizer, so it holds only if the text is the same"
    name = set_of(key)
    return "other held-out data" if _held_out(run, base, name) != _held_out(base, run, name) else ""


def changed_data(run: RunSeries, base: RunSeries) -> list[str]:
    """The settings of `data` by which the two trained on other text, or in another order.

    A source that lies elsewhere is the same if its content is, as the runs' ledgers have it, which know also what was
    read before a resume, and by a run without a config.yaml.
    """
    ours, theirs = (_data_settings(one) for one in (run, base))
    changed = []
    for key in sorted(ours.keys() & theirs.keys() - set(NOT_DATA)):
        left, right = ours[key], theirs[key]
        if key == "sources":
            left, right = _by_content(run, base, left), _by_content(base, run, right)
        if left != right:
            changed.append(f"data.{key}")
    if run.data and base.data and run.data.sources != base.data.sources and "data.sources" not in changed:
        changed.append("data.sources")
    return changed


def set_of(key: str) -> str:
    """The name of the held-out set of a metric, such as `eval/NAME/loss`."""
    return key.removeprefix("eval/").rpartition("/")[0]


def _data_settings(run: RunSeries) -> Mapping[str, Any]:
    return (run.settings or {}).get("data") or {}


def _same_file(first: str, second: str) -> bool:
    """Whether the two are one: by name, or by content where both can be read."""
    paths = Path(first), Path(second)
    return first == second or (all(map(Path.is_file, paths)) and paths[0].read_bytes() == paths[1].read_bytes())


def _by_content(run: RunSeries, other: RunSeries, sources: Any) -> list[dict[str, Any]]:
    """The settings of sources or held-out sets, their paths replaced by their content where both runs know it."""
    known = [{**one.data.sources, **one.data.held_out} if one.data else {} for one in (run, other)]
    return [
        {**item, "paths": known[0][name]} if all((name := item.get("name")) in contents for contents in known) else item
        for item in sources or []
    ]


def _held_out(run: RunSeries, other: RunSeries, name: str) -> Any:
    """What the loss on held-out set `name` is of; None where nothing is known."""
    settings = [_data_settings(one) for one in (run, other)]
    if not all(settings):
        return run.data.held_out.get(name) if run.data and other.data else None
    sets = [
        {key: item.get(key) for key in ("name", "paths", "max_tokens")}
        for item in settings[0].get("evaluation") or []
        if item.get("name") == name
    ]
    rows = {key: settings[0][key] for key in ("seq_length", "reset_documents") if all(key in one for one in settings)}
    return _by_content(run, other, sets), rows


def different_numbers(run: RunSeries, other: RunSeries, first: int, last: int) -> list[str]:
    """Where loss and gradient norm of steps `first` to `last` are not the same, bit for bit, or not in both.

    Raises ValueError where that would prove nothing: an empty range, steps that neither has, nothing but NaN.
    """
    if not 1 <= first <= last:
        raise ValueError(
            f"steps {first} to {last} are no range, so nothing would be compared; give FIRST <= LAST from 1"
        )
    end = max(run.last_step, other.last_step)
    steps = range(first, min(last, end) + 1)
    if not any(step in one.steps for step in steps for one in (run, other)):
        raise ValueError(
            f"neither {run.name} (to step {run.last_step}) nor {other.name} (to step {other.last_step}) has a"
            f" step from {first} to {last}"
        )
    different, num_finite = [f"steps {end + 1} to {last} are in neither"] if last > end else [], 0
    for step, key in itertools.product(steps, ("loss", "grad_norm")):
        recorded = [one.steps.get(step, {}) for one in (run, other)]
        ours, theirs = (values.get(key) for values in recorded)
        if ours is None and theirs is None and all("consumed_tokens" in values for values in recorded):
            continue  # a step without a target has no loss
        if ours is None or theirs is None or not (ours == theirs or (math.isnan(ours) and math.isnan(theirs))):
            different.append(f"step {step}: {key} {ours} in {run.name}, {theirs} in {other.name}")
        else:
            num_finite += math.isfinite(ours)
    if not (different or num_finite):
        raise ValueError(f"steps {first} to {last} of {run.name} and {other.name} hold nothing but NaN and infinities")
    return different
