"""Which rank this process is: the only reader of the launchers' variables.

Launchers nest: srun starts torchrun on each node, mpirun runs inside an allocation. The innermost one numbers the
ranks; each outer one must have started as many tasks as there are ranks, or as there are launchers inside it. If not,
tasks that believe to be alone train the same model side by side. So whatever is half said or contradictory is refused,
and MEGATRON_FP4_LAUNCHER says whose variables count where a person knows better.

    MEGATRON_FP4_LAUNCHER=none python -m megatron_fp4.pretrain ...     one process alone, whatever the scheduler says

Not here: how the ranks then meet (rendezvous.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

CHOSEN_LAUNCHER = "MEGATRON_FP4_LAUNCHER"
EXPECTED_WORLD_SIZE = "MEGATRON_FP4_EXPECTED_WORLD_SIZE"
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""Rank, world size, local rank and local size, as Open MPI, MVAPICH2, and MPICH or Intel MPI name them."""
SLURM_COUNTS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
NO_STEP = "42949672"
"""How slurm's reserved step numbers begin: those of a batch script and of salloc's shell, which srun did not start."""


@dataclass(frozen=True)
class Launch:
    """What the launcher said about this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"{self.launcher}: rank {self.rank} is outside the world of {self.world_size} rank(s)")
        if not 0 <= self.local_rank < self.local_world_size <= self.world_size:
            raise ValueError(
                f"{self.launcher}: local rank {self.local_rank} of {self.local_world_size} on this node does not fit a"
                f" world of {self.world_size} rank(s)"
            )

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.local_world_size)


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read the variables of torchrun, mpirun or srun; without any, this process is alone.

    Raises ValueError if they are incomplete, contradict each other, or contradict the world size that the launch script
    announced (MEGATRON_FP4_EXPECTED_WORLD_SIZE): a launcher that starts fewer processes than were paid for must not
    train.
    """
    env = os.environ if environment is None else environment
    launch = _chosen(env)
    expected = env.get(EXPECTED_WORLD_SIZE, "")
    if expected not in ("", str(launch.world_size)):
        raise ValueError(
            f"{EXPECTED_WORLD_SIZE} = {expected}, but the launcher ({launch.launcher}) started {launch.world_size}"
            " process(es): check the number of nodes and of tasks per node, and that the program is started by srun or"
            " torchrun (launch/slurm.sbatch and launch/torchrun.sh do); unset the variable to start it by hand"
        )
    if launch.num_nodes > 1 and is_loopback(env.get("MASTER_ADDR", "")):
        raise ValueError(
            f"MASTER_ADDR = {env.get('MASTER_ADDR', '')!r} with {launch.num_nodes} nodes: the other nodes cannot"
            " reach a loopback address; export the first node's host name (launch/slurm.sbatch does)"
        )
    return launch


@dataclass(frozen=True)
class MeetingPlace:
    """Where the store of the rendezvous is. held_by_agent: torchrun holds it, else rank 0 does.

    attempt: torchrun starts failed ranks anew (--max-restarts) and keeps the store, with what the dead ones said.
    """

    address: str
    port: int
    held_by_agent: bool
    attempt: str = "0"

    def __str__(self) -> str:
        return f"{self.address}:{self.port}"


def meeting_place(launch: Launch) -> MeetingPlace:
    """MASTER_ADDR:MASTER_PORT. Raises ValueError if one is not set, or not a port."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(
                f"{name} is not set, and {launch.launcher} does not choose a rendezvous: export the first node's host"
                " name as MASTER_ADDR and a free port of it as MASTER_PORT (launch/slurm.sbatch does)"
            )
    port = _count(os.environ, "MASTER_PORT", least=1)
    if port >= 1 << 16:
        raise ValueError(f"MASTER_PORT = {port}, must be at most 65535")
    return MeetingPlace(
        os.environ["MASTER_ADDR"],
        port,
        held_by_agent=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def is_loopback(address: str) -> bool:
    """Whether other nodes can not reach `address`."""
    return address in ("", "localhost", "::1") or address.startswith(("127.", "localhost."))


def environment(*prefixes: str) -> dict[str, str]:
    """The variables whose names begin with one of `prefixes`, sorted; for reports."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith(prefixes)}


def _chosen(env: Mapping[str, str]) -> Launch:
    """The innermost launcher's, after the outer ones agreed; or the one that MEGATRON_FP4_LAUNCHER names."""
    readers = {"torchrun": _torchrun, "mpirun": _mpirun, "srun": _srun}
    chosen = env.get(CHOSEN_LAUNCHER, "")
    if chosen == "none":
        return Launch()
    if chosen:
        launch = readers[chosen](env) if chosen in readers else None
        if launch is None:
            raise ValueError(
                f"{CHOSEN_LAUNCHER} = {chosen}, whose variables are not set; one of none, {', '.join(readers)},"
                " or unset it"
            )
        return launch
    inner = next((launch for read in (_torchrun, _mpirun) if (launch := read(env))), None)
    if inner is None:
        return _srun(env) or Launch()
    _check_outer(inner, env)
    return inner


def _torchrun(env: Mapping[str, str]) -> Launch | None:
    given = [name for name in ("RANK", "WORLD_SIZE") if name in env]
    if not given:
        return None
    if len(given) == 1:
        missing = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ValueError(
            f"{given[0]} = {env[given[0]]} is set and {missing} is not: a launcher sets both; start the program by"
            f" launch/torchrun.sh, or unset {given[0]} to train with one process"
        )
    rank, world_size = _count(env, "RANK"), _count(env, "WORLD_SIZE", least=1)
    local_size = _count(env, "LOCAL_WORLD_SIZE", least=1) if "LOCAL_WORLD_SIZE" in env else world_size
    local_rank = _count(env, "LOCAL_RANK") if "LOCAL_RANK" in env else rank % local_size
    return Launch(rank, world_size, local_rank, local_size, "torchrun")


def _mpirun(env: Mapping[str, str]) -> Launch | None:
    for names in MPI_VARIABLES:
        if not (present := [name for name in names[:2] if name in env]):
            continue
        if "SLURM_PROCID" in env and names[0] == "PMI_RANK":
            return None  # srun sets these two for MPI programs of its own
        missing = [name for name in names if name not in env]
        world_size = _count(env, names[1], least=1) if names[1] in env else 0
        if missing and world_size != 1:
            raise ValueError(
                f"{present[-1]} = {env[present[-1]]} is set and {missing[0]} is not: mpirun sets both; start the"
                f" program by launch/torchrun.sh, or set {CHOSEN_LAUNCHER}=none to train with one process"
            )
        if world_size > 1:
            rank, local_rank = _count(env, names[0]), _count(env, names[2])
            return Launch(rank, world_size, local_rank, _count(env, names[3], least=1), "mpirun")
    return None


def _srun(env: Mapping[str, str]) -> Launch | None:
    """The launch by srun; None in a shell of an allocation, and for a single task."""
    if "SLURM_PROCID" not in env:
        return None
    rank, tasks = _count(env, "SLURM_PROCID"), _tasks(env)
    if tasks == 0 and rank > 0:
        raise ValueError(f"SLURM_PROCID = {rank}, but none of {', '.join(SLURM_COUNTS)} says how many tasks there are")
    if tasks <= 1:
        return Launch(rank, 1, 0, 1, "srun") if rank else None
    if "SLURM_JOB_ID" in env and env.get("SLURM_STEP_ID", NO_STEP).startswith(NO_STEP):
        raise ValueError(
            f"{tasks} slurm tasks were asked for, but this is the batch script's own process or salloc's, and not one"
            " of them: start the program by srun (launch/slurm.sbatch does), or set"
            f" {CHOSEN_LAUNCHER}=none to train with one process"
        )
    if "SLURM_LOCALID" not in env:
        raise ValueError(f"SLURM_PROCID = {rank} of {tasks} tasks, but SLURM_LOCALID is not set: srun sets both")
    return Launch(rank, tasks, _count(env, "SLURM_LOCALID"), _tasks_per_node(env, tasks), "srun")


def _tasks(env: Mapping[str, str]) -> int:
    """Tasks of the slurm step, else of the allocation; 0 = slurm does not say."""
    names = SLURM_COUNTS[1:] if env.get("SLURM_STEP_ID", "").startswith(NO_STEP) else SLURM_COUNTS
    counts = {name: _count(env, name, least=1) for name in names if name in env}
    if len(set(counts.values())) > 1:
        message = ", ".join(f"{name} = {value}" for name, value in counts.items())
        raise ValueError(f"slurm's variables contradict each other: {message}; one was exported by hand, unset it")
    return next(iter(counts.values()), 0)


def _tasks_per_node(env: Mapping[str, str], tasks: int) -> int:
    """The most tasks of this step on a node."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if text := env.get(name, ""):
            sizes = _expand(name, text)
            if name == "SLURM_NTASKS_PER_NODE" and len(sizes) == 1:
                return min(sizes[0], tasks)
            if sum(sizes) == tasks:
                return max(sizes)
            if name == "SLURM_STEP_TASKS_PER_NODE":
                raise ValueError(f"{name} = {text} is {sum(sizes)} tasks, but slurm says {tasks}; unset what is wrong")
    nodes = next((_count(env, n, least=1) for n in ("SLURM_STEP_NUM_NODES", "SLURM_NNODES") if n in env), 1)
    return -(-tasks // nodes)


def _expand(name: str, text: str) -> list[int]:
    """slurm's way to write a number for each node: "2(x2),1" -> [2, 2, 1]."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None or int(match[1]) < 1:
            raise ValueError(f"{name} = {text!r}, must be numbers of tasks as slurm writes them, such as 2(x2),1")
        sizes += [int(match[1])] * int(match[2] or 1)
    return sizes


def _check_outer(inner: Launch, env: Mapping[str, str]) -> None:
    """Refuse a launcher inside an outer one that started another number of tasks than it has ranks or nodes."""
    outer = {"slurm": _tasks(env)}
    mpi = _mpirun(env) if inner.launcher == "torchrun" else None
    outer |= {"mpirun": mpi.world_size} if mpi else {}
    agents = _count(env, "GROUP_WORLD_SIZE", least=1) if "GROUP_WORLD_SIZE" in env else inner.num_nodes
    for name, tasks in outer.items():
        if tasks > 1 and tasks not in (inner.world_size, agents):
            raise ValueError(
                f"{name} has {tasks} tasks, but {inner.launcher} says that the world is {inner.world_size} rank(s) on"
                f" {agents} node(s): each task would train on its own; start one {inner.launcher} for all tasks, or set"
                f" {CHOSEN_LAUNCHER}={inner.launcher} if only these ranks are meant"
            )


def _count(env: Mapping[str, str], name: str, least: int = 0) -> int:
    text = env[name]
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise ValueError(
            f"{name} = {text!r}, must be a whole number of at least {least}; unset it, or mend the launcher"
        )
    return int(text)
