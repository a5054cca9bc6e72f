"""Run a function on several gloo ranks and hand their results back.

The reference of a distributed test is computed in one process; the ranks return their slices, and the test compares.
"""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_fp4.comm.bootstrap import Launch, start_process, stop_process
from megatron_fp4.comm.mesh import Group, ParallelConfig, ParallelMesh, build_mesh


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _entry(rank: int, world_size: int, port: int, queue: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        process = start_process("cpu", 120.0, Launch(rank, world_size, rank, world_size, "torchrun"))
        result = fn(rank, world_size, *args)
        buffer = io.BytesIO()  # as bytes: shared-memory tensors are gone once their sender has exited
        torch.save(result, buffer)
        queue.put((rank, buffer.getvalue(), None))
        stop_process(process)
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` gloo processes; returns their results in rank order.

    `fn` must be a module-level function and its result picklable. Raises AssertionError with a
    failed rank's traceback.
    """
    context = mp.get_context("spawn")
    queue, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_entry, args=(rank, world_size, port, queue, fn, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, result, error = queue.get(timeout=timeout_seconds)
            assert error is None, f"rank {rank} of {world_size} failed:\n{error}"
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


def world_group(rank: int, world_size: int) -> Group:
    """Inside a rank function: the group of all ranks."""
    return Group("world", tuple(range(world_size)), rank, dist.group.WORLD if world_size > 1 else None)


def mesh_for(rank: int, world_size: int, **sizes: int) -> ParallelMesh:
    """Inside a rank function: the mesh of the given sizes."""
    return build_mesh(ParallelConfig(**sizes), world_group(rank, world_size))
