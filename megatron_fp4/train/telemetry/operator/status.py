"""How a run stands, from its directory alone: whether it lives, its newest step, its pace, its last save and event.

Whoever holds the lock lives: on this host the kernel is asked, on another one the heartbeat of the lock is looked at
(storage/lock.py), by this host's clock. Only the end of metrics.jsonl is read, so that a run of millions of steps is
looked at in a moment. Nothing is written.

Not here: curves, comparisons (series.py), the whole time of a run (goodput.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint.directory import latest_step, step_name
from megatron_fp4.checkpoint.mirror.state import MirrorState
from megatron_fp4.storage.append import read_tail
from megatron_fp4.storage.durable import MANIFEST
from megatron_fp4.storage.lock import Holder, last_holder
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.metrics import METRICS_FILE
from megatron_fp4.train.telemetry.operator.events import EVENTS_FILE, first_steps

TAIL_BYTES = 1 << 20
PACE_STEPS = 50
"""The newest steps whose time by the clock gives the ETA."""
LONG_SILENCE, LEAST_SILENCE_SECONDS = 10, 60.0
"""So many steps' time without a metric is said, but not before a minute."""


class RunState(Enum):
    starting = "starting"  # a launch lives and has made no step yet
    running = "running"
    finished = "finished"  # the last step is made and saved
    stopped = "stopped"  # on request, or by hand; the same command goes on
    failed = "failed"  # by an error, the watchdog, a signal, or with its node

    @property
    def exit_code(self) -> int:
        """The code of `megatron-fp4 status`: 1 for a run that stands still before its end."""
        return 1 if self in (RunState.stopped, RunState.failed) else 0


@dataclass(frozen=True)
class RunStatus:
    """See the module. why: what the state is known from. step: the newest one made, of `last_step`.

    loss: of the newest step; a NaN as it is. tokens_per_second: median of the newest steps. eta_seconds: until the last
    step, by the clock; None unless it runs. last_step: 0 while it is not known. save_step: of the checkpoint that a
    resume takes. event: see events.py. mirror: None for a run without one.
    """

    run: str
    state: RunState
    why: str
    host: str | None
    step: int
    last_step: int
    loss: float | None
    tokens_per_second: float | None
    eta_seconds: float | None
    last_metric_age_seconds: float | None
    save_step: int | None
    save_age_seconds: float | None
    event: Mapping[str, Any] | None
    mirror: MirrorState | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; a loss that is no number is text, as in metrics.jsonl."""
        finite = self.loss is None or abs(self.loss) < float("inf")
        return {**asdict(self), "state": self.state.name, "loss": self.loss if finite else str(self.loss)}


def look_at(config: RunConfig) -> RunStatus:
    """The status of the run in `config.train.run_dir`."""
    run_dir, now = Path(config.train.run_dir), time.time()
    records = [one for one in read_tail(run_dir / METRICS_FILE, TAIL_BYTES) if "consumed_tokens" in one]
    events = read_tail(run_dir / EVENTS_FILE, TAIL_BYTES)
    newest: Mapping[str, Any] = records[-1] if records else {}
    step = newest.get("step", 0)
    last_step = config.last_step(step, int(newest.get("consumed_tokens", 0)) // config.data.seq_length)
    age = max(0.0, now - newest["wall_time"]) if "wall_time" in newest else None
    pace = _seconds_per_step(records, events)
    holder = last_holder(run_dir)
    state, why = _state(holder, records, events, step >= last_step > 0)
    if state is RunState.running and age and pace and age > max(LONG_SILENCE * pace, LEAST_SILENCE_SECONDS):
        why += f"; no step for {age:,.0f} s, where one takes {pace:,.1f} s"
    save_step = latest_step(run_dir / "checkpoints")
    saved = run_dir / "checkpoints" / step_name(save_step) / MANIFEST if save_step is not None else None
    rates = [one["tokens_per_second"] for one in records[-PACE_STEPS:] if "tokens_per_second" in one]
    return RunStatus(
        run=str(run_dir),
        state=state,
        why=why,
        host=holder.owner.host if holder and holder.owner else None,
        step=step,
        last_step=last_step,
        loss=float(newest["loss"]) if "loss" in newest else None,
        tokens_per_second=statistics.median(rates) if rates else None,
        eta_seconds=pace * (last_step - step) if pace is not None and state is RunState.running else None,
        last_metric_age_seconds=age,
        save_step=save_step,
        save_age_seconds=max(0.0, now - saved.stat().st_mtime) if saved else None,
        event=events[-1] if events else None,
        mirror=MirrorState.read(run_dir) if config.checkpoint.mirror else None,
    )


def look_at_start(run_dir: Path) -> RunStatus | None:
    """The status of a run that has stored no settings yet; None where no launch holds its directory, or died there."""
    holder = last_holder(run_dir)
    if holder is None:
        return None
    state, why = _state(holder, [], [], at_end=False)
    host = holder.owner.host if holder.owner else None
    return RunStatus(str(run_dir), state, why, host, 0, 0, None, None, None, None, None, None, None)


def _state(
    holder: Holder | None, records: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], at_end: bool
) -> tuple[RunState, str]:
    last = events[-1] if events else {}
    if holder and holder.may_live():
        launched = next((one["time"] for one in reversed(events) if one["event"] in ("start", "resume")), 0.0)
        makes_steps = bool(records) and records[-1].get("wall_time", launched) >= launched
        return RunState.running if makes_steps else RunState.starting, f"held by {holder.describe()}"
    if holder:
        return RunState.failed, f"{holder.describe()} is gone and said nothing: killed, or its node died"
    kind = last.get("event")
    if kind in ("fail", "hang"):
        return RunState.failed, last["text"]
    if kind in ("stop", "rewind"):
        return RunState.stopped, last["text"]
    if kind == "finish" or at_end:
        return RunState.finished, "the last step is made"
    return RunState.stopped, "no launch holds it"


def _seconds_per_step(records: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds by the clock, evaluations and saves included, but not the first step of a launch with its start-up."""
    firsts = first_steps(events)
    times = [one["wall_seconds"] for one in records if "wall_seconds" in one and one["step"] not in firsts]
    return statistics.fmean(times[-PACE_STEPS:]) if times else None
