"""Start and stop of one process of a job: the only reader of the launcher's environment.

Rank, world size and rendezvous address are read here once, from torchrun (RANK, WORLD_SIZE, ...) or from slurm's srun
(SLURM_PROCID, ...), and become a `Group` and a device. Nothing else in the package reads the environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout  # no public name in torch 2.13

from megatron_fp4.comm.mesh import Group


def is_loopback(address: str) -> bool:
    """Whether other nodes can not reach `address`."""
    return address in ("", "localhost", "::1") or address.startswith(("127.", "localhost."))


EXPECTED_WORLD_SIZE = "MEGATRON_FP4_EXPECTED_WORLD_SIZE"


@dataclass(frozen=True)
class Launch:
    """What the launcher said about this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)


@dataclass(frozen=True)
class Process:
    """This process, started: its world group and device."""

    launch: Launch
    world: Group
    device: torch.device


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read torchrun's or srun's variables.

    Raises ValueError if they contradict each other or the world size that the launch script announced
    (MEGATRON_FP4_EXPECTED_WORLD_SIZE): a launcher that starts fewer processes than were paid for must not train.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        world_size = int(env["WORLD_SIZE"])
        launch = Launch(
            rank=int(env["RANK"]),
            world_size=world_size,
            local_rank=int(env.get("LOCAL_RANK", env["RANK"])),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", world_size)),
            launcher="torchrun",
        )
    elif "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        launch = Launch(
            rank=int(env["SLURM_PROCID"]),
            world_size=int(env["SLURM_NTASKS"]),
            local_rank=int(env["SLURM_LOCALID"]),
            local_world_size=int(env.get("SLURM_NTASKS_PER_NODE", "0")) or int(env["SLURM_NTASKS"]),
            launcher="srun",
        )
    else:
        launch = Launch()
    expected = env.get(EXPECTED_WORLD_SIZE, "")
    if expected not in ("", str(launch.world_size)):
        raise ValueError(
            f"{EXPECTED_WORLD_SIZE} = {expected}, but the launcher ({launch.launcher}) started {launch.world_size}"
            " process(es): check the number of nodes and of tasks per node, and that the program is started by srun or"
            " torchrun (launch/slurm.sbatch and launch/torchrun.sh do); unset the variable to start it by hand"
        )
    if not 0 <= launch.rank < launch.world_size:
        raise ValueError(f"{launch.launcher}: rank {launch.rank} is outside the world of {launch.world_size} ranks")
    if launch.num_nodes > 1 and is_loopback(env.get("MASTER_ADDR", "")):
        raise ValueError(
            f"MASTER_ADDR = {env.get('MASTER_ADDR', '')!r} with {launch.num_nodes} nodes: the other nodes cannot"
            " reach a loopback address; export the first node's host name (launch/slurm.sbatch does)"
        )
    return launch


def environment(*prefixes: str) -> dict[str, str]:
    """The variables whose names begin with one of `prefixes`, sorted; for reports."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}


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
) -> Process:
    """Join the job. A single process starts no torch.distributed at all.

    timeout_seconds: of every later collective of the world. Raises ValueError for an unusable device or rendezvous,
    RuntimeError if the ranks do not meet within `init_timeout_seconds` (or `timeout_seconds` if that is less).
    """
    launch = launch or read_launch()
    device = choose_device(device_name, launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.world_size == 1:
        return Process(launch, Group.single("world"), device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if launch.launcher == "srun" and "MASTER_PORT" not in os.environ:
        raise ValueError(
            "MASTER_PORT is not set: srun does not choose a rendezvous port; export one (launch/slurm.sbatch does)"
        )
    patience = min(init_timeout_seconds, timeout_seconds)
    try:
        dist.init_process_group(
            backend,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=patience),
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        raise RuntimeError(
            f"rank {launch.rank}: the {launch.world_size} ranks did not meet at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} within {patience:g} s (parallel.init_timeout_seconds); a rank was not"
            f" started or has failed, or the address cannot be reached from every node"
        ) from error
    _set_pg_timeout(timedelta(seconds=timeout_seconds))
    ranks = tuple(range(launch.world_size))
    return Process(launch, Group("world", ranks, launch.rank, dist.group.WORLD), device)


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
