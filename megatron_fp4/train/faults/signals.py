"""A request to stop, from the scheduler, a person or the clock.

A signal only sets a flag; the ranks agree on the flag at the end of a step, save once and leave with a code that the
launcher understands.

    SIGTERM, SIGUSR1, Ctrl-C  stop at the end of this step, save, exit EXIT_REQUEUE
    train.exit_after_seconds  the same
    a second Ctrl-C           exit EXIT_INTERRUPTED at once

Python handles a signal in its main thread, between two instructions: never while that waits in a collective for a rank
that hangs. So a thread of its own counts Ctrl-C, told by the C handler through a pipe.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from megatron_fp4.comm.bootstrap import exit_process

EXIT_OK = 0
EXIT_FAILED = 1
"""A restart may help."""
EXIT_CONFIG = 2
EXIT_REQUEUE = 85
"""Stopped on request with the state saved: start the same command again."""
EXIT_HUNG = 86
"""A rank hung; the watchdog has named it. Nothing was saved since the last checkpoint."""
EXIT_INTERRUPTED = 128 + signal.SIGINT
"""Ended at once by Ctrl-C. Nothing was saved since the last checkpoint."""


class StopRequest:
    """Collects requests to stop this rank, while used in a `with` by the main thread.

    speaks: whether this rank answers Ctrl-C with a line on stderr. last_act: what a second Ctrl-C still does.
    """

    def __init__(self, exit_after_seconds: float = 0.0, *, speaks: bool = True) -> None:
        self.last_act: Callable[[], None] = lambda: None
        self._deadline = time.monotonic() + exit_after_seconds if exit_after_seconds else None
        self._speaks = speaks
        self._signal = ""

    def __enter__(self) -> StopRequest:
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._count_interrupts, args=(reader,), name="interrupts", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        self._handlers_before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name

    def _count_interrupts(self, reader: int) -> None:
        """Ends with the pipe."""
        count = 0
        while number := os.read(reader, 1):
            count += number[0] == signal.SIGINT
            if count > 1:
                self._say("Ctrl-C again: ending at once; nothing was saved since the last checkpoint")
                self.last_act()
                exit_process(EXIT_INTERRUPTED)
            elif number[0] == signal.SIGINT:
                self._say("Ctrl-C: the run saves and ends after this step; once more to end at once")
        os.close(reader)

    def _say(self, text: str) -> None:
        if self._speaks:
            print(text, file=sys.stderr, flush=True)

    @property
    def reason(self) -> str:
        """Why this rank wants to stop; empty if it does not."""
        if self._signal:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "train.exit_after_seconds"
        return ""

    def requested(self) -> bool:
        """Whether there is a `reason`."""
        return bool(self.reason)
