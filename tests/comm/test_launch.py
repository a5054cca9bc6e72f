"""Whatever a launcher says is served or refused in one sentence; no process trains alone by mistake."""

from __future__ import annotations

import re

import pytest

from megatron_fp4.comm.launch import EXPECTED_WORLD_SIZE, Launch, read_launch

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "n1",
}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}
"""What slurm 22.05 sets in the shell of `salloc -N2 -n4`."""
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2"}
"""... in a batch script."""
STEP = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "n1",
}
"""... in a task that srun started from it."""
ONE_TASK = {
    **STEP,
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_NPROCS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
"""... in the task of `srun -n1`."""


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN])
def test_expected_size_is_accepted(environment: dict[str, str]) -> None:
    assert read_launch({**environment, EXPECTED_WORLD_SIZE: "4"}).world_size == 4
    assert read_launch(environment).world_size == 4, "a launch by hand announces nothing and must work"


@pytest.mark.parametrize(("environment", "launcher"), [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_other_size_is_refused(environment: dict[str, str], launcher: str) -> None:
    with pytest.raises(ValueError, match=rf"= 8, but the launcher \({launcher}\) started 4"):
        read_launch({**environment, EXPECTED_WORLD_SIZE: "8"})


@pytest.mark.parametrize("environment", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}])
def test_silent_single_process_is_refused(environment: dict[str, str]) -> None:
    """Eight tasks that each believe to be alone would train eight models on the same data."""
    with pytest.raises(ValueError, match="= 8, but the launcher"):
        read_launch({**environment, EXPECTED_WORLD_SIZE: "8"})


@pytest.mark.parametrize("address", ["", "localhost", "127.0.1.1", "::1"])
def test_several_nodes_refuse_a_loopback_rendezvous(address: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": address}
    with pytest.raises(ValueError, match="with 2 nodes: the other nodes cannot reach a loopback"):
        read_launch(environment)
    assert read_launch({**environment, "MASTER_ADDR": "node1"}).num_nodes == 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (ALLOCATION, Launch()),  # a shell of an allocation: what srun did not start is one process
        (ONE_TASK, Launch()),
        (STEP, Launch(3, 4, 1, 2, "srun")),
        ({"SLURM_PROCID": "1", "SLURM_NPROCS": "4", "SLURM_LOCALID": "1"}, Launch(1, 4, 1, 4, "srun")),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "2(x2)", "MASTER_ADDR": "n1"}, Launch(1, 4, 1, 2, "srun")),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_LOCALID": "0"}, Launch(3, 4, 0, 3, "srun")),
        (MPIRUN, Launch(3, 4, 1, 2, "mpirun")),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Launch(1, 2, 1, 2, "mpirun"),
        ),
        ({**STEP, "PMI_RANK": "3", "PMI_SIZE": "4"}, Launch(3, 4, 1, 2, "srun")),  # srun --mpi=pmi2
        ({**TORCHRUN, **BATCH}, Launch(1, 4, 1, 4, "torchrun")),  # torchrun in a batch script, as many ranks as tasks
        (  # one torchrun a node, each started by srun
            {**STEP, **TORCHRUN, "WORLD_SIZE": "32", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "4"},
            Launch(1, 32, 1, 8, "torchrun"),
        ),
        ({**BATCH, "MEGATRON_FP4_LAUNCHER": "none"}, Launch()),
        ({**STEP, **ALONE, "MEGATRON_FP4_LAUNCHER": "torchrun"}, Launch(0, 1, 0, 1, "torchrun")),
        ({**STEP, **ALONE, "MEGATRON_FP4_LAUNCHER": "srun"}, Launch(3, 4, 1, 2, "srun")),
    ],
)
def test_what_is_served(environment: dict[str, str], expected: Launch) -> None:
    assert read_launch(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({**ALONE, "SLURM_NTASKS": "4"}, r"slurm has 4 tasks, but torchrun says that the world is 1 rank"),
        ({**STEP, **ALONE}, r"each task would train on its own; start one torchrun for all tasks"),
        ({**MPIRUN, **ALONE}, r"mpirun has 4 tasks, but torchrun says that the world is 1 rank"),
        (
            {**STEP, **MPIRUN, "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2"},
            r"slurm has 4 tasks, but mpirun",
        ),
        ({"RANK": "3"}, r"RANK = 3 is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "3"}, r"WORLD_SIZE = 3 is set and RANK is not"),
        (BATCH, r"4 slurm tasks were asked for, but this is the batch script's own process .* MEGATRON_FP4_LAUNCHER="),
        ({"SLURM_PROCID": "2"}, r"SLURM_PROCID = 2, but none of"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "1"}, r"srun: rank 2 is outside the world of 1 rank"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, r"SLURM_LOCALID is not set"),
        ({**SRUN, "SLURM_NPROCS": "8"}, r"contradict each other: SLURM_NTASKS = 4, SLURM_NPROCS = 8"),
        ({**SRUN, "SLURM_NTASKS_PER_NODE": "two"}, r"SLURM_NTASKS_PER_NODE = 'two', must be numbers of tasks"),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2"}, r"is 2 tasks, but slurm says 4"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, r"LOCAL_WORLD_SIZE = '0', must be a whole number of at least 1"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, r"local rank 1 of 8 on this node does not fit a world of 4"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, r"local rank 4 of 4"),
        ({**TORCHRUN, "RANK": "4"}, r"rank 4 is outside the world of 4"),
        ({**TORCHRUN, "RANK": "-1"}, r"RANK = '-1', must be"),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, r"WORLD_SIZE = 'four', must be"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, r"OMPI_COMM_WORLD_LOCAL_RANK is not"),
        ({"MEGATRON_FP4_LAUNCHER": "srun"}, r"MEGATRON_FP4_LAUNCHER = srun, whose variables are not set"),
        ({"MEGATRON_FP4_LAUNCHER": "k8s"}, r"one of none, torchrun, mpirun, srun"),
    ],
)
def test_what_is_refused(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        read_launch(environment)
    assert not re.search(r"\n", str(caught.value)), "one sentence"


SALLOC_SHELL = {
    "SLURM_JOB_ID": "1", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_STEP_NUM_TASKS": "1",
}  # fmt: skip


def test_the_shell_of_salloc_is_not_one_of_its_tasks() -> None:
    """Its own step has one task, the allocation more: that was called a contradiction, for torchrun too."""
    with pytest.raises(ValueError, match=r"^8 slurm tasks were asked for, .*start the program by srun"):
        read_launch(SALLOC_SHELL)
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}
    assert read_launch(SALLOC_SHELL | torchrun) == Launch(3, 8, 3, 8, "torchrun")


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK"])
def test_a_rank_without_its_world_does_not_train_alone(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} = 3 is set and .* is not"):
        read_launch({name: "3"})
