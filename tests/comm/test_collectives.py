"""Sums are exact, in rank order, the same on every rank and at every position; shapes and gradients are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm import autograd, collectives
from megatron_fp4.comm.mesh import DrawnGroup, Group
from tests.helpers.distributed import run_distributed, world_group

WORLD = 3


def inputs(rank: int) -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(rank))


def _all(rank: int, world_size: int) -> dict[str, Any]:
    group = world_group(rank, world_size)
    x = inputs(rank)
    big = torch.full((5000,), 0.1 * (rank + 1))
    x9 = torch.arange(9.0).view(9, 1).repeat(1, 2) + 100 * rank
    small = torch.tensor([1.0, float("nan") if rank == 1 else 2.0])
    results: dict[str, Any] = {
        "sum": collectives.all_reduce_sum(x, group),
        "sum_big": collectives.all_reduce_sum(big, group),
        "sum_bf16": collectives.all_reduce_sum(torch.tensor([256.0 if rank == 0 else 1.0]).bfloat16(), group),
        "sum_fp64": collectives.all_reduce_sum(torch.tensor([2.0**30 if rank == 0 else 2.0**-20]).double(), group),
        "max": collectives.all_reduce_max(small, group),
        "gather": collectives.all_gather_rows(x[: rank + 1], group, [1, 2, 3]),
        "scatter": collectives.reduce_scatter_rows(x, group, [3, 2, 2]),
        "even": collectives.reduce_scatter_rows(x9, group),
        "broadcast": collectives.broadcast(x, group, source=2),
        "fp8": collectives.all_gather_rows(x.to(torch.float8_e4m3fn), group).float(),
        "object": collectives.all_gather_object({"rank": rank}, group),
        "bytes": collectives.gather_bytes(255 - rank, group),
        "told": collectives.told_by([1, 2], "x" * rank, group),
        "untouched": torch.equal(x, inputs(rank)),
    }
    return results


def test_every_collective() -> None:
    ranks = run_distributed(_all, WORLD)
    parts = [inputs(rank) for rank in range(WORLD)]
    total = (parts[0] + parts[1]) + parts[2]
    for rank, results in enumerate(ranks):
        assert torch.equal(results["sum"], total), "the sum is not in rank order"
        assert len(results["sum_big"].unique()) == 1, "the sum depends on the position in the buffer"
        assert results["sum_bf16"].item() == 258.0, "BF16 was accumulated in BF16"
        assert results["sum_fp64"].item() == 2.0**30 + 2 * 2.0**-20, "FP64 was accumulated in FP32"
        assert results["max"][0] == 1.0
        assert torch.isnan(results["max"][1]), "NaN on one rank must reach all"
        assert torch.equal(results["gather"], torch.cat([parts[r][: r + 1] for r in range(WORLD)]))
        assert torch.equal(results["scatter"], total.split([3, 2, 2])[rank])
        assert results["even"].shape == (3, 2)
        assert torch.equal(results["broadcast"], parts[2])
        assert torch.equal(results["fp8"], torch.cat(parts).to(torch.float8_e4m3fn).float())
        assert [item["rank"] for item in results["object"]] == [0, 1, 2]
        assert results["bytes"].tolist() == [255, 254, 253]
        assert results["told"] == {1: "x", 2: "xx"}
        assert results["untouched"], "a collective changed its input"


def _gradients(rank: int, world_size: int) -> dict[str, Tensor]:
    group = world_group(rank, world_size)
    results = {}
    for name, rows in (("gather_rows", 2), ("scatter_sum_rows", 6), ("scatter_rows", 6), ("copy_to_group", 2)):
        x = torch.ones(rows, 1, requires_grad=True)
        y = getattr(autograd, name)(x, group)
        weight = torch.arange(1.0, len(y) + 1).view(-1, 1) * (rank + 1)
        (y * weight).sum().backward()
        assert x.grad is not None
        results[name] = x.grad.flatten()
    return results


def test_gradients_are_the_adjoint_collectives() -> None:
    for rank, results in enumerate(run_distributed(_gradients, WORLD)):
        rows = torch.arange(1.0, 7.0)
        assert torch.equal(results["gather_rows"], 6 * rows[2 * rank : 2 * rank + 2]), "gradients must be summed"
        per_rank = torch.cat([torch.arange(1.0, 3.0) * (r + 1) for r in range(WORLD)])
        assert torch.equal(results["scatter_sum_rows"], per_rank)
        assert torch.equal(results["scatter_rows"], per_rank)
        assert torch.equal(results["copy_to_group"], 6 * torch.arange(1.0, 3.0))


def test_a_group_of_one_returns_its_input() -> None:
    x, group = torch.ones(3), Group.single()
    assert collectives.all_reduce_sum(x, group) is x
    assert collectives.reduce_scatter_rows(x, group) is x
    assert autograd.gather_rows(x, group) is x


def test_a_drawn_group_passes_on_shapes_only() -> None:
    """Each result has the shape and type that a rank of a real group gets; values have nowhere to come from."""
    group, x = DrawnGroup("drawn", (4, 5, 6), 1), torch.empty(7, 5, dtype=torch.bfloat16, device="meta")
    on_the_way: list[str] = []

    def while_sending() -> None:
        on_the_way.append("called")

    shapes = {
        "sum": collectives.all_reduce_sum(x, group),
        "max": collectives.all_reduce_max(x, group),
        "gather": collectives.all_gather_rows(x, group),
        "uneven gather": collectives.all_gather_rows(x, group, [3, 7, 2]),
        "scatter": collectives.reduce_scatter_rows(x, group, [3, 2, 2], while_sending),
        "exchange": collectives.all_to_all_rows(x, group, [3, 2, 2], [2, 2, 2], while_sending),
    }
    rows = {"sum": 7, "max": 7, "gather": 21, "uneven gather": 12, "scatter": 2, "exchange": 6}
    assert {name: (*result.shape, result.dtype) for name, result in shapes.items()} == {
        name: (count, 5, torch.bfloat16) for name, count in rows.items()
    }
    assert len(on_the_way) == 2
    with pytest.raises(AssertionError, match="which is only drawn"):
        collectives.all_reduce_sum(torch.zeros(3), group)
