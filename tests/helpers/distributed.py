"""Run a test's function on several gloo ranks and hand their results back.

The reference of a distributed test is computed in one process; the ranks return their slices, and the test compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import Group, ParallelMesh, build_mesh


def _call(process: Process, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return fn(process.world.rank, process.world.size, *args)


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` gloo processes; returns their results in rank order.

    `fn` must be a module-level function. Raises RuntimeError with a failed rank's traceback.
    """
    return run_local(_call, world_size, fn, args, timeout_seconds=timeout_seconds)


def world_group(rank: int, world_size: int) -> Group:
    """Inside a rank function: the group of all ranks."""
    return Group("world", tuple(range(world_size)), rank, dist.group.WORLD if world_size > 1 else None)


def mesh_for(rank: int, world_size: int, *, experts: bool = False, **sizes: int) -> ParallelMesh:
    """Inside a rank function: the mesh of the given sizes."""
    return build_mesh(ParallelConfig(**sizes), world_group(rank, world_size), experts=experts)
