"""A logger that may hang or fail without anybody waiting for it.

One idea: a thread of its own makes the sink and feeds it from a bounded queue. Whatever the sink does (an import that
takes a minute, a login that waits for an answer, an exception), `write` returns at once; when the queue is full or the
sink raises, it is switched off with one warning.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from typing import Protocol

MAX_WAITING = 10_000
"""Records; some hours of a run while a logger's server is away."""
CLOSE_SECONDS = 20.0
"""How long the end of a run waits for what is still queued."""


class Sink(Protocol):
    """A destination of numbers."""

    def write(self, step: int, values: dict[str, float]) -> None: ...
    def rewind(self, step: int) -> None:
        """What was written for later steps is void, where the destination can forget."""

    def close(self) -> None: ...


class BackgroundSink:
    """Feeds the sink that `make` returns."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name, self._make = name, make
        self._queue: queue.Queue[Callable[[Sink], None]] = queue.Queue(MAX_WAITING)
        self._off = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"{name}-logger", daemon=True)
        self._thread.start()

    def write(self, step: int, values: dict[str, float]) -> None:
        self._put(lambda sink: sink.write(step, values))

    def rewind(self, step: int) -> None:
        self._put(lambda sink: sink.rewind(step))

    def close(self) -> None:
        self._put(self._finish)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"it did not finish within {CLOSE_SECONDS:g} s")

    def _put(self, act: Callable[[Sink], None]) -> None:
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait(act)
        except queue.Full:
            self._warn(f"{MAX_WAITING} records wait for it")

    def _finish(self, sink: Sink) -> None:
        sink.close()
        self._off.set()

    def _work(self) -> None:
        try:
            sink = self._make()
            while not self._off.is_set():
                self._queue.get()(sink)
        except BaseException as error:  # logging must never stop a run
            self._warn(f"{type(error).__name__}: {error}")

    def _warn(self, why: str) -> None:
        if not self._off.is_set():
            print(f"warning: {self._name} logging is off from here on: {why}", file=sys.stderr, flush=True)
        self._off.set()
