"""Run a function on several gloo processes of this machine and hand their results back.

A layout of eight ranks can be checked on a laptop: the processes are forked from a server that has imported torch once,
so that eight of them start in about the time of one.

For checks, tests and benchmarks. Not here: training, which a launcher starts (bootstrap.py).
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import queue as queues
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from megatron_fp4.comm.bootstrap import Process, start_process, stop_process
from megatron_fp4.comm.launch import Launch

PRELOADED = [__name__, "torch.distributed.pipelining"]
"""What the server imports beside the first function's module; each rank imports what it needs of the rest itself.

torch's pipelines import its compiler, which takes a second.
"""


class _Answer(NamedTuple):
    """What a rank says when it ends. result: pickled. error: its traceback."""

    rank: int
    result: bytes = b""
    error: str | None = None


def free_port() -> int:
    """A TCP port on this host that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def run_local(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Call `fn(process, *args)` in `world_size` single-threaded processes; returns their results in rank order.

    fn: a module-level function, called with its started `Process`; arguments and result are pickled. Raises
    RuntimeError with the traceback of the first rank that fails, TimeoutError if one does not answer in time.
    """
    processes, answers = _start(fn, world_size, args)
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            answer: _Answer = answers.get(timeout=timeout_seconds)
            if answer.error is not None:
                raise RuntimeError(f"rank {answer.rank} of {world_size} failed:\n{answer.error}")
            results[answer.rank] = pickle.loads(answer.result)
    except queues.Empty:
        missing = sorted(set(range(world_size)) - set(results))
        raise TimeoutError(f"ranks {missing} of {world_size} gave no answer in {timeout_seconds:g} s") from None
    finally:
        _end(processes, wait_seconds=10.0 if len(results) == world_size else 0.0)
    return [results[rank] for rank in range(world_size)]


def kill_local(
    fn: Callable[..., Any], world_size: int, *args: Any, when: Callable[[], bool], timeout_seconds: float = 300.0
) -> None:
    """Start `fn` as `run_local` does, and SIGKILL every rank as soon as `when()`, wherever they are.

    Raises RuntimeError if a rank ends before, TimeoutError if it never is.
    """
    processes, answers = _start(fn, world_size, args)
    deadline = time.monotonic() + timeout_seconds
    try:
        while not when():
            with suppress(queues.Empty):
                answer: _Answer = answers.get(timeout=0.02)
                error = answer.error or ""
                raise RuntimeError(f"rank {answer.rank} of {world_size} ended before it could be killed:\n{error}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{world_size} ranks did not get to where they should be killed")
    finally:
        _end(processes, wait_seconds=0.0)


def _start(fn: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> tuple[list[Any], Any]:
    """The processes, and the queue of their answers."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, fn.__module__])  # the first call decides
    answers, port = context.Queue(), free_port()
    processes = [
        context.Process(
            target=_entry, args=(Launch(rank, world_size, rank, world_size, "local"), port, answers, fn, args)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.daemon = True
        process.start()
    return processes, answers


def _entry(launch: Launch, port: int, answers: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        process: Process = start_process("cpu", 120.0, launch, init_timeout_seconds=110.0)
        result = pickle.dumps(fn(process, *args))
        stop_process(process)
        answers.put(_Answer(launch.rank, result))
    except BaseException:
        answers.put(_Answer(launch.rank, error=traceback.format_exc()))
    answers.close()
    answers.join_thread()
    os._exit(0)  # see bootstrap.exit_process


def _end(processes: list[Any], wait_seconds: float) -> None:
    for process in processes:
        process.join(timeout=wait_seconds)
        if process.is_alive():
            process.kill()
            process.join()
