"""The ranks meet soon or not at all, and a time-out names who did not come."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_fp4.comm.bootstrap import start_process
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.local import free_port
from tests.helpers.distributed import run_distributed


def test_ranks_that_do_not_meet_are_reported_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the ten minutes that a collective may take."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(
        RuntimeError,
        match=r"the 2 ranks did not meet at 127\.0\.0\.1:\d+ within 1 s .* rank\(s\) 1; rank\(s\) 0 came, from",
    ):
        start_process("cpu", 600.0, Launch(0, 2, 0, 2, "torchrun"), init_timeout_seconds=1.0)


def later_timeout(rank: int, world_size: int) -> float:
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    return float(backend.options._timeout.total_seconds())


def test_collectives_have_the_long_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_distributed(later_timeout, 2) == [120.0, 120.0]
