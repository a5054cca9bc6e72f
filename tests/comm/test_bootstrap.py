"""`read_launch` refuses a world of another size than the launch script announced; ranks meet soon or not at all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_fp4.comm.bootstrap import EXPECTED_WORLD_SIZE, Launch, read_launch, start_process
from megatron_fp4.comm.local import free_port
from tests.helpers.distributed import run_distributed

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}


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


def test_ranks_that_do_not_meet_are_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the ten minutes that a collective may take."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RuntimeError, match=r"the 2 ranks did not meet at 127\.0\.0\.1:\d+ within 1 s"):
        start_process("cpu", 600.0, Launch(0, 2, 0, 2, "torchrun"), init_timeout_seconds=1.0)


def later_timeout(rank: int, world_size: int) -> float:
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return float(backend.options._timeout.total_seconds())


def test_collectives_have_the_long_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_distributed(later_timeout, 2) == [120.0, 120.0]


@pytest.mark.parametrize("address", ["", "localhost", "127.0.1.1", "::1"])
def test_several_nodes_refuse_a_loopback_rendezvous(address: str) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": address}
    with pytest.raises(ValueError, match="with 2 nodes: the other nodes cannot reach a loopback"):
        read_launch(environment)
    assert read_launch({**environment, "MASTER_ADDR": "node1"}).num_nodes == 2
