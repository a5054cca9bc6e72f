"""A request to stop, from the scheduler or the clock.

A signal only sets a flag; the ranks agree on the flag at the end of a step, save once and leave with a code that the
launcher understands.

    SIGTERM, SIGUSR1          stop at the end of this step, save, exit EXIT_REQUEUE
    train.exit_after_seconds  the same
"""

from __future__ import annotations

import signal
import time
from types import FrameType

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_REQUEUE = 85
"""Stopped on request with the state saved: start the same command again."""
EXIT_HUNG = 86
"""A rank hung; the watchdog has named it. Nothing was saved since the last checkpoint."""


class StopRequest:
    """Collects requests to stop this rank; install() once, from the main thread."""

    def __init__(self, exit_after_seconds: float = 0.0) -> None:
        self._deadline = time.monotonic() + exit_after_seconds if exit_after_seconds else None
        self._signal = ""

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; empty if it does not."""
        if self._signal:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "train.exit_after_seconds"
        return ""
