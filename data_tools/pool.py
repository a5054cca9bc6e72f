"""An ordered map over processes that holds a bounded number of items, notices a dead worker, and leaves no orphan.

Each worker process hangs on a pipe of its own, served by one thread of the parent (send an item, wait for
its result). If a worker dies the parent reads end-of-file, if the parent dies the worker does.
`multiprocessing.Pool.imap` reads its whole input ahead and hangs when a worker is killed; `ProcessPoolExecutor` can
hang too when it happens while an item larger than a pipe's buffer is on its way (cpython issue 94777).
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # items in flight per worker


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    initializer: Callable[..., None],
    initargs: tuple[Any, ...],
) -> Iterator[tuple[Item, Result]]:
    """(item, function(item)) in the order of `items`; in this process if workers == 1."""
    if workers == 1:
        initializer(*initargs)
        for item in items:
            yield item, function(item)
        return
    team = [_Worker(function, initializer, initargs) for _ in range(workers)]
    idle: queue.SimpleQueue[_Worker[Item, Result]] = queue.SimpleQueue()
    for worker in team:
        idle.put(worker)

    def call(item: Item) -> Result:
        worker = idle.get()
        try:
            return worker.call(item)
        finally:
            idle.put(worker)

    pending: deque[tuple[Item, Future[Result]]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append((item, threads.submit(call, item)))
            if len(pending) >= workers * AHEAD:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        for worker in team:
            worker.stop()


class _Worker(Generic[Item, Result]):
    """One process and the parent's end of its pipe."""

    def __init__(
        self, function: Callable[[Item], Result], initializer: Callable[..., None], initargs: tuple[Any, ...]
    ) -> None:
        context = multiprocessing.get_context("spawn")  # fork would copy whatever threads the caller runs
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_serve, args=(end, function, initializer, initargs), daemon=True)
        self._process.start()
        end.close()  # or the death of the worker would not close the pipe

    def call(self, item: Item) -> Result:
        try:
            self._pipe.send(item)
            result, error = self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError("a worker process died (killed, or out of memory); run the command again") from None
        if error is not None:
            raise error
        return result

    def stop(self) -> None:
        self._pipe.close()
        self._process.join()


def _serve(
    pipe: Connection, function: Callable[[Any], Any], initializer: Callable[..., None], initargs: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, whose end ends this loop
    refusal = _outcome(lambda: initializer(*initargs))[1]
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        answer = (None, refusal) if refusal else _outcome(functools.partial(function, item))
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def _outcome(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What `call` returns, or why it does not. A panic of a library in Rust is no Exception and cannot be sent."""
    try:
        return call(), None
    except Exception as error:
        return None, error
    except BaseException as error:
        return None, RuntimeError(f"{type(error).__name__}: {error}")
