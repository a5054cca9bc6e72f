"""The rank grid and the groups cut from it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh, describe, rank_grid
from tests.helpers.distributed import mesh_for, run_distributed


def test_rank_order_is_tp_then_cp_then_dp_then_pp() -> None:
    grid = rank_grid(ParallelConfig(tp=2, cp=2, dp=2, pp=2), 16)
    for pp in range(2):
        for dp in range(2):
            for cp in range(2):
                for tp in range(2):
                    assert grid[pp, dp, cp, tp] == ((pp * 2 + dp) * 2 + cp) * 2 + tp


def test_dp_is_what_the_world_leaves() -> None:
    assert ParallelConfig(tp=2, pp=2).resolve_dp(16) == 4


@pytest.mark.parametrize(
    ("config", "world", "expected"),
    [
        (ParallelConfig(tp=4), 6, r"4 \* 1 \* 1 \* \? must equal 6"),
        (ParallelConfig(tp=2, dp=2), 8, r"2 \* 1 \* 1 \* 2 must equal 8"),
        (ParallelConfig(tp=4), 2, "start 4 ranks"),
    ],
)
def test_a_layout_that_does_not_fit_names_the_equation(config: ParallelConfig, world: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        config.resolve_dp(world)


def _groups(rank: int, world_size: int) -> dict[str, Any]:
    mesh = mesh_for(rank, world_size, tp=2, pp=2)
    names = ("tp", "cp", "dp", "pp", "dp_cp", "tp_cp", "world")
    return {name: (getattr(mesh, name).ranks, getattr(mesh, name).rank) for name in names}


def test_groups_of_every_rank() -> None:
    ranks = run_distributed(_groups, 4)
    assert [groups["tp"][0] for groups in ranks] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [groups["pp"][0] for groups in ranks] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    assert [groups["dp"][0] for groups in ranks] == [(0,), (1,), (2,), (3,)]
    for rank, groups in enumerate(ranks):
        for name, (ranks, index) in groups.items():
            assert ranks[index] == rank, f"rank {rank} is at the wrong place in {name}"


def test_a_single_process_needs_no_process_group() -> None:
    mesh = ParallelMesh.single_process()
    assert mesh.tp.size == mesh.world.size == 1
    assert mesh.is_main


def test_the_grid_is_drawn() -> None:
    assert "stage 1, dp 1: [6 7]" in describe(ParallelConfig(tp=2, pp=2), 8)
