"""The rank grid and the groups cut from it."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh, describe, draw_mesh, rank_grid
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
        (ParallelConfig(tp=2, ep=4), 6, r"ep = 4 does not divide the tp \* cp \* dp = 2 \* 1 \* 3 = 6 ranks"),
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


def test_experts_are_shared_by_neighbours_of_a_stage() -> None:
    """tp 2 dp 4 in each of two stages, cut into fours: a group spans whole data-parallel ranks, never a stage."""
    config = ParallelConfig(tp=2, pp=2, ep=4)
    meshes = [draw_mesh(config, 16, rank) for rank in range(16)]
    assert [mesh.ep.ranks for mesh in meshes[::4]] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)]
    for rank, mesh in enumerate(meshes):
        assert mesh.ep.ranks[mesh.ep.rank] == mesh.edp.ranks[mesh.edp.rank] == rank
        assert mesh.edp.ranks == tuple(sorted({rank, rank ^ 4})), "the same experts in the other group of the stage"
    text = describe(config, 16)
    assert "edp 2 x ep 4" in text
    assert "stage 1, experts: [8 9 10 11] [12 13 14 15]" in text
    assert "experts" not in describe(ParallelConfig(tp=2), 4)


@pytest.mark.parametrize(
    ("sizes", "smallest"), [({"ep": 4}, 4), ({"tp": 2, "ep": 4}, 4), ({"tp": 2, "ep": 3}, 6), ({"dp": 8, "ep": 2}, 8)]
)
def test_the_smallest_world_has_room_for_the_experts(sizes: dict[str, int], smallest: int) -> None:
    config = ParallelConfig(**sizes)
    assert config.smallest_world == smallest
    config.resolve_dp(smallest)


def test_a_single_process_needs_no_process_group() -> None:
    mesh = ParallelMesh.single_process()
    assert mesh.tp.size == mesh.world.size == 1
    assert mesh.is_main


def test_the_grid_is_drawn() -> None:
    assert "stage 1, dp 1: [6 7]" in describe(ParallelConfig(tp=2, pp=2), 8)
