"""An ordered map over processes that holds a bounded number of items and does not outlive its parent.

`multiprocessing.Pool.imap` reads its whole input ahead and hangs when a worker is killed; this does neither.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any, TypeVar

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
    context = multiprocessing.get_context("spawn")  # fork would copy whatever threads the caller runs
    pending: deque[tuple[Item, Future[Result]]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker, (initializer, initargs)) as pool:
        try:
            for item in items:
                pending.append((item, pool.submit(function, item)))
                if len(pending) >= workers * AHEAD:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise RuntimeError("a worker process died (killed, or out of memory); run the command again") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(initializer: Callable[..., None], initargs: tuple[Any, ...]) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    initializer(*initargs)


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever (it holds both ends of the queue's pipe)."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
