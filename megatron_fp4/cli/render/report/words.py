"""What a comparison shows, in sentences: who reads one paragraph of a report reads this one.

Nothing is claimed that was not measured. One run of each setting says nothing about what another seed would give; how
far the difference moved in the course of these runs is a fact, and is said instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_fp4.cli.render.comparison import changed_settings, mean_of, notes, number, other_forms, tokens_text
from megatron_fp4.train.history.events import EventKind, RunEvent
from megatron_fp4.train.resume.differences import ABSENT
from megatron_fp4.train.telemetry.gaps import comparable_keys, gap_percent, last_gap, no_gap_because, set_of
from megatron_fp4.train.telemetry.series import RunSeries, matching_keys

SETTINGS_IN_A_SENTENCE = 4
FEW_STEPS = 2000
FEW_TOKENS = 1e9
LEAST_PERCENT = 0.01
"""The last digit of a difference; a smaller one is not called equal, which means equal to the bit."""


def in_words(runs: Sequence[RunSeries], events: Sequence[Sequence[RunEvent]]) -> list[str]:
    """A paragraph for each run, and what the differences are worth. events: of each run."""
    base, *others = runs
    paragraphs = []
    for run, of_run in zip(runs, events, strict=True):
        compared = [] if run is base else [_against(run, base), _movement(run, base), _settings(run, base)]
        paragraphs.append(" ".join(filter(None, [_ends(run), *compared, _life(run, of_run)])))
    paragraphs += [line.removeprefix("note: ") + "." for line in notes(runs)]
    return paragraphs + ([_noise(runs)] if others else [])


def _ends(run: RunSeries) -> str:
    """`bf16 stands at step 60 (30,720 tokens): training loss 4.9398 (mean of the last 20 steps), ...`"""
    parts = [f"{of} {value}" for of, value in _losses(run)]
    return f"{run.name} stands at step {run.last_step:,} ({tokens_text(run.last_tokens)} tokens): {', '.join(parts)}."


def _losses(run: RunSeries) -> Iterator[tuple[str, str]]:
    if (loss := run.summary("loss")) is not None:
        yield "training loss", f"{number(loss)} ({mean_of(run)})"
    for key in matching_keys([run], "eval/.*/loss"):
        value, beside = run.summary(key), other_forms(run, set_of(key))
        if value is not None:
            yield f"loss on {set_of(key)}", number(value) + (f" ({', '.join(beside)})" if beside else "")


def _against(run: RunSeries, base: RunSeries) -> str:
    """Each loss against the first run's at the last tokens that both have."""
    parts: dict[str, list[str]] = {}
    for key in comparable_keys(run, base):
        if (gap := last_gap(run, base, key)) is not None:
            parts.setdefault(tokens_text(gap.tokens), []).append(f"{_of(key)} is {_amount(gap.percent)}")
    texts = [f"At {tokens} tokens, {', '.join(of_tokens)} that of {base.name}." for tokens, of_tokens in parts.items()]
    if reason := no_gap_because(run, base):
        texts.append(f"Its other losses are not compared with those of {base.name}: {reason}.")
    return " ".join(texts) or f"It has no tokens in common with {base.name}."


def _amount(percent: float) -> str:
    if percent != percent:
        return "NaN against"
    if percent == 0:
        return "equal to"
    amount = f"{abs(percent):.2f} %" if abs(percent) >= LEAST_PERCENT / 2 else f"less than {LEAST_PERCENT} %"
    return f"{amount} {'above' if percent > 0 else 'below'}"


def _of(key: str) -> str:
    of = "bits per byte" if key.endswith("/bits_per_byte") else "the loss"
    return "the training loss" if key == "loss" else f"{of} on {set_of(key)}"


def _settings(run: RunSeries, base: RunSeries) -> str:
    changes = changed_settings([base, run])
    if not changes:
        known = run.settings is not None and base.settings is not None
        return f"Its settings are those of {base.name}." if known else ""
    shown = [_change(key, *values, base=base.name) for key, *values in changes[:SETTINGS_IN_A_SENTENCE]]
    more = len(changes) - len(shown)
    return f"Settings that differ: {', '.join(shown)}{f' and {more} more, below' if more else ''}."


def _change(key: str, before: str, after: str, *, base: str) -> str:
    if ABSENT in (before, after):
        return f"{key} (only here)" if before == ABSENT else f"{key} (only in {base})"
    return f"{key} {after} instead of {before}"


def _life(run: RunSeries, events: Sequence[RunEvent]) -> str:
    """Resumes, rollbacks, skipped steps, and what changed on the way."""
    parts = [f"{of} after step {event.step}" for event in events if (of := _EVENTS.get(event.kind))]
    skipped = int(run.summary("skipped_steps") or 0)
    if skipped:
        parts.append(f"{skipped} step{'s' if skipped > 1 else ''} without an update")
    if broken := run.not_finite("loss"):
        parts.append(f"a loss that is not finite in {len(broken)} step(s), the last {broken[-1]}")
    if not parts:
        return "It ran without a resume, a rollback or a skipped step."
    return f"On the way: {', '.join(parts)}."


_EVENTS = {
    EventKind.resume: "resumed",
    EventKind.rollback: "rolled back to the state",
    EventKind.precision: "another precision",
    EventKind.data: "another data phase",
}


def _noise(runs: Sequence[RunSeries]) -> str:
    """What the differences are worth."""
    seeds = [_seeds(run) for run in runs]
    once = "Each of these runs was made once"
    if all(seeds):
        same = all(one == seeds[0] for one in seeds)
        once += f", from {'one seed' if same else 'seeds of its own'} ({', '.join(seeds[:1] if same else seeds)})"
    text = f"{once}: how much another seed would change was not measured, so the differences have no interval."
    steps, tokens = min(run.last_step for run in runs), min(run.last_tokens for run in runs)
    if steps < FEW_STEPS or tokens < FEW_TOKENS:
        text += (
            f" The runs are short ({steps:,} steps, {tokens_text(tokens)} tokens): the seed, or the next evaluation,"
            " can decide which of such runs is ahead, so a small difference in either direction is to be read as noise."
        )
    return text


def _movement(run: RunSeries, base: RunSeries) -> str:
    """Between which values the difference lay in the second half of the common tokens."""
    if no_gap_because(run, base):
        return ""
    keys = [*matching_keys([run, base], "eval/.*/loss")[:1], "loss"]
    measured = ((key, gap_percent(run, base, key)) for key in keys)
    key, gaps = next((one for one in measured if len(one[1].values) > 2), ("", None))
    if gaps is None:
        return ""
    late = [value for tokens, value in zip(gaps.tokens, gaps.values, strict=True) if 2 * tokens >= gaps.tokens[-1]]
    late = [value for value in late if value == value]
    if not late:
        return ""
    return (
        f"In the second half of the common tokens {_of(key)} lay between {min(late):+.2f} % and {max(late):+.2f} % of"
        f" that of {base.name}."
    )


def _seeds(run: RunSeries) -> str:
    settings: Any = run.settings or {}
    seeds = {f"{section}.seed": (settings.get(section) or {}).get("seed") for section in ("train", "data")}
    return ", ".join(f"{key}={value}" for key, value in seeds.items() if value is not None)
