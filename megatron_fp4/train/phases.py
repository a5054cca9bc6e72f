"""Which part of a step this rank is in, since when, and how long each part took.

The step says `enter("reduce")` where a part begins; the watchdog reads where it stands, and the straggler report how
long the parts of the last step took. Reading from another thread needs no lock.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

STEP_PHASES = ("data", "assign", "forward_backward", "reduce", "agree", "update")
"""In order. What lies between two steps (logging, evaluation, a save), before the first and after the last is entered
under other names."""

INDEX_SECONDS = 3600.0
"""The first start may build the indices of billions of documents; benchmarks/data.py: about ten million a second."""


class CurrentPhase(NamedTuple):
    """Where a rank is. step: the one that is being made, from 1. since: time.monotonic() when the phase began."""

    step: int
    name: str
    since: float


class DeviceEvent(Protocol):
    """A mark in the work of a device (torch.cuda.Event with timing)."""

    def record(self) -> None:
        """Stand behind the work that was given to the device so far."""

    def query(self) -> bool:
        """Whether the device has passed it; does not wait."""

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds of the device from this event to `end_event`, both passed."""


class DeviceTimer:
    """Seconds of the device in each phase of a step, without waiting for it.

    Kernels run behind the host, so an event is recorded at each boundary, and read when the next step has ended: the
    host has waited for that step's loss, which comes after all events of the step before.
    """

    def __init__(self, new_event: Callable[[], DeviceEvent]) -> None:
        self._new_event = new_event
        self._step = 0
        self._present: list[tuple[str, DeviceEvent]] = []
        self._previous: list[tuple[str, DeviceEvent]] = []

    def begin(self, step: int) -> None:
        """A step begins; after a rollback it does not follow the one before."""
        self._previous = self._present if step == self._step + 1 else []
        self._step, self._present = step, []

    def enter(self, phase: str) -> None:
        """A phase begins; one that only goes on is not counted anew."""
        if not self._present or self._present[-1][0] != phase:
            event = self._new_event()
            event.record()
            self._present.append((phase, event))

    def previous_step(self) -> dict[str, float]:
        """Phase -> seconds, of the step before the present one; empty if there was none, or the device is behind."""
        seconds: dict[str, float] = {}
        for (phase, begin), (_, end) in itertools.pairwise(self._previous):
            if phase in STEP_PHASES:
                if not end.query():
                    return {}
                seconds[phase] = seconds.get(phase, 0.0) + begin.elapsed_time(end) / 1e3
        return seconds


class Phases:
    """Where this rank is, and the seconds of each phase of the present step.

    On CUDA kernels run behind the host: while `exact` is set, `device` is waited for at every boundary. timer: the
    device's own seconds, None on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self.exact = False
        self.timer: DeviceTimer | None = None
        self._last_lap = time.monotonic()
        self.current = CurrentPhase(0, "start", time.monotonic())

    def begin(self, step: int, *, exact: bool = False) -> None:
        """A step begins; forget the seconds of the one before."""
        self.exact = exact
        if self.timer is None and self.device.type == "cuda":
            self.timer = DeviceTimer(lambda: torch.cuda.Event(enable_timing=True))
        if self.timer:
            self.timer.begin(step)
        self.enter("between")
        self._seconds = {}
        self.current = self.current._replace(step=step)

    def enter(self, phase: str) -> None:
        """The next part begins here."""
        if self.exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.timer:
            self.timer.enter(phase)
        now, last = time.monotonic(), self.current
        self._seconds[last.name] = self._seconds.get(last.name, 0.0) + now - last.since
        self.current = CurrentPhase(last.step, phase, now)

    def beat(self) -> None:
        """Still in the same phase, and alive: the watchdog counts from here."""
        self.enter(self.current.name)

    def lap(self) -> float:
        """Seconds since the last lap; in the first one since this object was made, when the process began."""
        now, last = time.monotonic(), self._last_lap
        self._last_lap = now
        return now - last

    def seconds(self, phase: str) -> float:
        """Seconds spent in `phase` during this step, without the time since it was entered last."""
        return self._seconds.get(phase, 0.0)

    def step_seconds(self) -> float:
        """Seconds of all phases of the step."""
        return sum(self.seconds(phase) for phase in STEP_PHASES)
