"""Start and stop of one process of a job: its device, and the groups of all of them.

Not here: what the launcher said (launch.py), and how the ranks find each other (rendezvous.py).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.launch import Launch, read_launch
from megatron_fp4.comm.mesh import Group, ParallelMesh, build_mesh, set_timeout
from megatron_fp4.comm.rendezvous import RanksNotMet, Rendezvous, meet


@dataclass(frozen=True)
class Process:
    """This process, started: its world group, its device, and where its ranks met (alone, if nothing is said)."""

    launch: Launch
    world: Group
    device: torch.device
    rendezvous: Rendezvous = field(default_factory=Rendezvous.alone)


def choose_device(name: str, local_rank: int) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this rank. Raises ValueError if cuda is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ValueError(f"device = {name!r}; one of auto, cpu, cuda")
    if not torch.cuda.is_available():
        raise ValueError(
            "device = cuda, but torch sees no CUDA device; use device=cpu, or install a CUDA build of torch"
        )
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU of its own: this node has {torch.cuda.device_count()};"
            " start at most that many processes per node"
        )
    return torch.device("cuda", local_rank)


def start_process(
    device_name: str = "auto",
    timeout_seconds: float = 600.0,
    launch: Launch | None = None,
    init_timeout_seconds: float = 180.0,
    rendezvous: Rendezvous | None = None,
) -> Process:
    """Join the job. A single process starts no torch.distributed at all.

    timeout_seconds: of every later collective of the world. rendezvous: where the ranks have met already, None: they
    meet now. Raises ValueError for an unusable device or rendezvous, RanksNotMet if the ranks do not meet within
    `init_timeout_seconds` (or `timeout_seconds` if that is less).
    """
    launch = launch or read_launch()
    device = choose_device(device_name, launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = min(init_timeout_seconds, timeout_seconds)
    rendezvous = rendezvous or meet(launch, patience)
    if rendezvous.store is None:
        return Process(launch, Group.single("world"), device, rendezvous)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("default_pg", rendezvous.store),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=patience),
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        raise RanksNotMet(
            f"rank {launch.rank}: all {launch.world_size} ranks came to the rendezvous, but could not be connected"
            f" within {patience:g} s (parallel.init_timeout_seconds); a rank has left since, or the nodes cannot reach"
            f" each other's network interface: {error}"
        ) from error
    set_timeout(timedelta(seconds=timeout_seconds))
    ranks = tuple(range(launch.world_size))
    return Process(launch, Group("world", ranks, launch.rank, dist.group.WORLD), device, rendezvous)


def connect_mesh(config: ParallelConfig, process: Process, *, experts: bool = False) -> ParallelMesh:
    """`build_mesh` in the world of `process`. Raises RanksNotMet if a rank does not come to make its groups."""
    try:
        return build_mesh(config, process.world, experts=experts)
    except dist.DistError as error:
        seconds = min(config.init_timeout_seconds, config.timeout_seconds)
        raise RanksNotMet(
            f"rank {process.world.rank}: all {process.world.size} ranks met, but could not make the groups of the"
            f" layout within {seconds:g} s (parallel.init_timeout_seconds); a rank has left since: {error}"
        ) from error


def start_alone(device_name: str = "auto") -> Process:
    """A job of this one process, whatever a launcher says."""
    return start_process(device_name, launch=Launch())


def stop_process(process: Process) -> None:
    """Leave the job in order; safe to call twice."""
    if process.world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


def exit_process(code: int) -> NoReturn:
    """End the program with `code` after flushing.

    `os._exit`, because gloo's helper threads were measured to abort the interpreter's own teardown (SIGABRT in 2 of 8
    runs without it, 0 of 18 with it), which would turn a finished run into a failed job.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
