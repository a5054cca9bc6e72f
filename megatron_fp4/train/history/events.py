"""What changed in the course of a run: precision, data, learning rate, resumes, rollbacks; where a curve may bend.

Every event stands behind a step: what came next was made otherwise than what was before.

Not here: how events are drawn (cli/render/report/).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from megatron_fp4.storage.append import read_values
from megatron_fp4.train.history.launches import read_launches
from megatron_fp4.train.telemetry.series import RunSeries

SPIKE_LOG = "spikes.jsonl"
"""In a run's directory: a line for everything that was done about a loss spike (train/faults/guard.py)."""
JUMP = 4.0
"""A learning rate jumps where it moves so many times further than in the steps before and after."""
LEAST_CHANGE = 0.01
"""Part of the highest learning rate below which no change is worth a mark."""


class EventKind(Enum):
    precision = "precision switch"
    data = "data phase"
    lr = "learning rate"
    resume = "resume"
    rollback = "rollback"


@dataclass(frozen=True)
class RunEvent:
    """Something that holds after `step`, at `tokens` consumed tokens; 0, 0 before the first step."""

    kind: EventKind
    step: int
    tokens: float
    text: str


def events_of(run: RunSeries) -> list[RunEvent]:
    """All of a run, in order."""
    events = [*_phases(run, "precision_phase", EventKind.precision), *_phases(run, "data_phase", EventKind.data)]
    events += [*_learning_rate(run), *_resumes(run), *_rollbacks(run)]
    return sorted(events, key=lambda event: event.step)


def spikes_of(run: RunSeries) -> list[dict[str, Any]]:
    """What was done about loss spikes, one entry a decision, as the run wrote it down."""
    return list(read_values(run.folder / SPIKE_LOG))


def tokens_after(run: RunSeries, step: int) -> float:
    """Tokens consumed when `step` had ended; of the newest step before it that was recorded, where it was not."""
    tokens = 0.0
    for number, values in run.steps.items():
        if number > step:
            break
        tokens = values.get("consumed_tokens", tokens)
    return tokens


def _event(run: RunSeries, kind: EventKind, step: int, text: str) -> RunEvent:
    return RunEvent(kind, step, tokens_after(run, step), text)


def _changes(run: RunSeries, key: str) -> Iterator[tuple[int, float, float]]:
    """Step, value and next value, for each step behind which a metric has another one."""
    values = [(step, record[key]) for step, record in run.steps.items() if key in record]
    for (step, before), (_, after) in itertools.pairwise(values):
        if before != after:
            yield step, before, after


def _phases(run: RunSeries, key: str, kind: EventKind) -> Iterator[RunEvent]:
    for step, _, after in _changes(run, key):
        yield _event(run, kind, step, f"{kind.value}: phase {after + 1:.0f} begins")


def _learning_rate(run: RunSeries) -> Iterator[RunEvent]:
    """Where it jumps, and where its decay begins."""
    steps = [(step, values["lr"]) for step, values in run.steps.items() if "lr" in values]
    rates = [rate for _, rate in steps]
    moves = [after - before for before, after in itertools.pairwise(rates)]
    least = LEAST_CHANGE * max(rates, default=0.0)
    for number, move in enumerate(moves):
        step, around = steps[number][0], [*moves[max(0, number - 1) : number], *moves[number + 1 : number + 2]]
        if abs(move) > least and len(around) == 2 and abs(move) > JUMP * max(map(abs, around)):
            yield _event(run, EventKind.lr, step, f"learning rate {rates[number]:.3g} to {rates[number + 1]:.3g}")
        elif move < 0 and number and moves[number - 1] == 0:
            yield _event(run, EventKind.lr, step, f"learning rate begins to fall from {rates[number]:.3g}")


def _resumes(run: RunSeries) -> Iterator[RunEvent]:
    for launch in read_launches(run.folder):
        if launch.step:
            yield _event(run, EventKind.resume, launch.step, f"resumed after step {launch.step}")


def _rollbacks(run: RunSeries) -> Iterator[RunEvent]:
    for entry in spikes_of(run):
        if (step := entry.get("to_step")) is not None:
            text = f"rolled back from step {entry['step']} to {step}; the samples between were skipped"
            yield _event(run, EventKind.rollback, step, text)
