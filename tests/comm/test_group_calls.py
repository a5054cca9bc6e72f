"""One call per axis makes all groups, whatever the size of the world; the same ranks get one communicator."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.scale import fake_world
from megatron_fp4.comm.bootstrap import Process, connect_mesh
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import build_ends_group, build_mesh
from megatron_fp4.comm.rendezvous import RanksNotMet

LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (128, {"tp": 8}, 2),
    (128, {"tp": 4, "pp": 4}, 3),
    (2944, {"tp": 4}, 2),
    (2944, {"tp": 8, "pp": 4}, 3),
    (8192, {"tp": 8, "pp": 4, "cp": 4}, 6),
    (8192, {"tp": 1, "cp": 2}, 2),
]
"""World, sizes, and groups of different ranks, beside the world."""


@pytest.mark.parametrize(("world_size", "sizes", "expected"), LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_calls_do_not_grow_with_the_world(
    world_size: int, sizes: dict[str, Any], expected: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_group = dist.new_group
    splits: dict[int, list[Any]] = {}
    calls = 0

    def counted(ranks: list[int], **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        return new_group(ranks, **settings)

    def split(_parent: Any, rows: list[list[int]], **settings: Any) -> Any:
        assert sorted(rank for row in rows for rank in row) == list(range(world_size)), (
            "a rank is in no part of a split"
        )
        splits[rank].append(rows)
        own = next(row for row in rows if rank in row)
        return counted(own, use_local_synchronization=True, **settings)

    monkeypatch.setattr(dist, "new_group", counted)
    monkeypatch.setattr(dist, "split_group", split)
    for rank in (0, world_size // 2 + 1, world_size - 1):
        calls, splits[rank] = 0, []
        with fake_world(rank, world_size) as world:
            monkeypatch.setattr(dist, "get_backend", lambda _group: backend)
            monkeypatch.setattr("megatron_fp4.comm.mesh.set_timeout", lambda *_: None)
            began = time.process_time()
            mesh = build_mesh(ParallelConfig(**sizes), world)
            assert time.process_time() - began < 2.0, "the rehearsal of a large world waits for this"
            assert calls == expected, f"rank {rank}"
            if "cp" not in sizes:
                assert mesh.tp.process_group is mesh.tp_cp.process_group, "two communicators of the same ranks"
                assert mesh.dp.process_group is mesh.dp_cp.process_group
    first, *others = splits.values()
    assert all(rows == first for rows in others), "the ranks would split differently, and hang"
    assert len(first) == (expected if backend == "nccl" else 0)


def test_groups_of_experts_have_no_communicator_of_what_travels_beside_the_computation() -> None:
    """Rows on their way to experts would wait behind buckets of gradients, in an order that ranks need not share."""
    for sizes in ({"ep": 4}, {"tp": 2, "ep": 2}, {"tp": 2, "ep": 4}, {"cp": 4, "ep": 4}, {"tp": 4}, {}):
        with fake_world(1, 4) as world:
            mesh = build_mesh(ParallelConfig(**sizes), world, experts=True)
            beside = {mesh.dp.process_group, mesh.dp_cp.process_group, mesh.edp.process_group} - {None}
            assert mesh.ep.process_group not in beside, sizes
            assert mesh.edp.process_group not in {mesh.tp.process_group, mesh.ep.process_group} - {None}, sizes
    with fake_world(1, 4) as world:
        mesh = build_mesh(ParallelConfig(), world, experts=True)
        assert mesh.edp.process_group is mesh.dp_cp.process_group, "two communicators of the same gradients"
    with fake_world(1, 4) as world:
        assert build_mesh(ParallelConfig(tp=4), world).edp.size == 1, "a model without experts makes no group for them"


def test_the_ends_of_two_stages_are_the_pipeline() -> None:
    with fake_world(1, 8) as world:
        two = ParallelConfig(pp=2)
        mesh = build_mesh(two, world)
        assert build_ends_group(two, mesh).process_group is mesh.pp.process_group
    with fake_world(2, 8) as world:
        four = ParallelConfig(pp=4)
        mesh = build_mesh(four, world)
        assert build_ends_group(four, mesh).ranks == (2,), "a rank in between is alone"


def make_groups_without_rank_1(process: Process) -> str:
    """tp 2 dp 2: rank 0 waits for rank 1 in tp, the other two then wait for these in dp."""
    config = ParallelConfig(tp=2, init_timeout_seconds=1.0)
    try:
        return "" if process.world.rank == 1 else str(connect_mesh(config, process).tp.ranks)
    except RanksNotMet as absence:
        return str(absence)


def test_a_rank_that_does_not_make_its_group_is_missed_soon() -> None:
    """The data may take `timeout_seconds`, 600, and the groups may not."""
    answers = run_local(make_groups_without_rank_1, 4)
    for rank in (0, 2, 3):
        assert answers[rank].startswith(
            f"rank {rank}: all 4 ranks met, but could not make the groups of the layout within 1 s"
        ), answers[rank]
