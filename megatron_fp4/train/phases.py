"""Which part of a step this rank is in, since when, and how long each part took.

The step says `enter("reduce")` where a part begins; the watchdog reads where it stands, and the straggler report how
long the parts of the last step took. Reading from another thread needs no lock.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

STEP_PHASES = ("data", "assign", "forward_backward", "reduce", "agree", "update")
"""In order. What lies between two steps (logging, evaluation, a save), before the first and after the last is entered
under other names."""


class CurrentPhase(NamedTuple):
    """Where a rank is. step: the one that is being made, from 1. since: time.monotonic() when the phase began."""

    step: int
    name: str
    since: float


class Phases:
    """Where this rank is, and the seconds of each phase of the present step.

    On CUDA kernels run behind the host: while `exact` is set, `device` is waited for at every boundary.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: dict[str, float] = {}
        self.exact = False
        self.current = CurrentPhase(0, "start", time.monotonic())

    def begin(self, step: int, *, exact: bool = False) -> None:
        """A step begins; forget the seconds of the one before."""
        self.exact = exact
        self.enter("between")
        self._seconds = {}
        self.current = self.current._replace(step=step)

    def enter(self, phase: str) -> None:
        """The next part begins here."""
        if self.exact and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, last = time.monotonic(), self.current
        self._seconds[last.name] = self._seconds.get(last.name, 0.0) + now - last.since
        self.current = CurrentPhase(last.step, phase, now)

    def beat(self) -> None:
        """Still in the same phase, and alive: the watchdog counts from here."""
        self.enter(self.current.name)

    def seconds(self, phase: str) -> float:
        """Seconds spent in `phase` during this step, without the time since it was entered last."""
        return self._seconds.get(phase, 0.0)

    def step_seconds(self) -> float:
        """Seconds of all phases of the step."""
        return sum(self.seconds(phase) for phase in STEP_PHASES)
