"""Batches made ahead by one thread, so that the trainer waits only when the data is slower than the step.

A batch is a pure function of (first sample, number of samples), so the thread needs only the list of steps
to come; throwing prefetched batches away (a resume, a change of ramp) costs time and nothing else. A stall is not
hidden: `data_wait_seconds` is how long `next` had to wait for the batch it returned.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from megatron_fp4.data.batch import Batch
from megatron_fp4.data.loader import Loader

LOOK_SECONDS = 1.0


class Prefetched(NamedTuple):
    first_sample: int
    num_samples: int
    batch: Batch
    data_wait_seconds: float


class _Failed(NamedTuple):
    error: Exception


class _End(NamedTuple):
    """No step is left."""


class _Made(NamedTuple):
    first_sample: int
    num_samples: int
    batch: Batch


class Prefetcher:
    """Iterator over the batches of `steps` [(first sample, number of samples), ...]; use it in a `with`.

    depth: batches kept ready. 0 makes each batch when it is asked for (its whole time is then wait). An error of the
    loader is raised by the `next` that would have returned the batch. while_waiting: called every second in which a
    `next` waits for the thread.
    """

    def __init__(
        self,
        loader: Loader,
        steps: Iterable[tuple[int, int]],
        *,
        depth: int = 2,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._loader = loader
        self._while_waiting = while_waiting
        self._steps = iter(steps)
        self._ready: queue.Queue[_Made | _Failed | _End] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if depth:
            self._thread = threading.Thread(target=self._work, name="data-prefetch", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[Prefetched]:
        return self

    def __next__(self) -> Prefetched:
        began = time.perf_counter()
        item = self._make() if self._thread is None else self._next_ready()
        if isinstance(item, _End):
            self._ready.put(item)  # every later call ends too
            raise StopIteration
        if isinstance(item, _Failed):
            self.close()
            raise item.error
        return Prefetched(*item, time.perf_counter() - began)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and drop what it made."""
        self._stop.set()
        while self._thread is not None and self._thread.is_alive():
            try:  # the thread may be blocked on a full queue
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def _next_ready(self) -> _Made | _Failed | _End:
        while True:
            try:
                return self._ready.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                self._while_waiting()

    def _make(self) -> _Made | _Failed | _End:
        step = next(self._steps, None)
        if step is None:
            return _End()
        try:
            return _Made(*step, self._loader.batch(*step))
        except Exception as error:
            return _Failed(error)

    def _work(self) -> None:
        while not self._stop.is_set():
            item = self._make()
            self._ready.put(item)
            if not isinstance(item, _Made):
                return
