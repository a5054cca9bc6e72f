"""Processes that a command starts, one run each; a request to stop the command is passed on to all that run."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class RunProcesses:
    """A context in which `run` starts processes, in one thread or several.

    stopped: whether a request to stop came. The processes have sessions of their own and see no terminal, so they get
    each signal once. In another thread than the main one nothing is passed on: there Python hears no signals.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._running: list[subprocess.Popen[bytes]] = []
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> RunProcesses:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path | None = None) -> int:
        """The exit code of the command, which writes to `log`, or else where this process does."""
        if log is None:
            return self._wait(subprocess.Popen(command, start_new_session=True))
        with open(log, "ab") as file:
            return self._wait(subprocess.Popen(command, start_new_session=True, stdout=file, stderr=file))

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        with process:
            self._running.append(process)
            try:
                code = process.wait()
            finally:
                self._running.remove(process)
        return code if code >= 0 else 128 - code

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        self.stopped = True
        for process in list(self._running):
            process.send_signal(signum)
