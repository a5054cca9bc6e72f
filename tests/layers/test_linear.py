"""A replicated, a column- and a row-parallel linear at tp 1, 2 and 4: output and gradients of one process."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.layers import lab
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.precision import EmulatedBackend, WgradPlan, nvfp4_paper
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.spec import LinearPrecision
from tests.helpers import planted
from tests.helpers.distributed import mesh_for, run_distributed
from tests.helpers.slices import assert_slices, largest_error

T, D, F = 64, 64, 128
RECIPES = {"high": LinearPrecision(), "nvfp4": nvfp4_paper()}


def run(mesh: ParallelMesh, precision: LinearPrecision) -> list[Shard]:
    """This rank's rows of y and dx, and of dw the rectangles that its weights are; of the replicated one, the sum."""
    context = LayerContext.of(mesh, EmulatedBackend(), StepClock(0), torch.float32, torch.device("cpu"))
    up = ColumnParallelLinear("up", D, {"gate": F, "": F}, context, std=0.1)
    down = RowParallelLinear("down", F, D, context, std=0.1)
    mix = ReplicatedLinear("mix", D, D, context, std=0.1)
    initialize_parameters(nn.ModuleList([up, down, mix]), 0)
    random = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(T, D, generator=random).chunk(mesh.tp.size)[mesh.tp.rank] for _ in "xy")
    tokens = Tokens.of_one_document(T)
    for linear in (up, down, mix):
        linear.precision = precision
        linear.weight.main_grad = torch.zeros(linear.weight.shape, dtype=torch.float64)
    x = x.clone().requires_grad_()
    gate, h = up(mix(x, tokens), tokens).chunk(2, dim=-1)
    y = down(gate * h, tokens)
    y.backward(dy)
    assert x.grad is not None
    first = mesh.tp.rank * len(y)
    shards = [
        Shard(Rectangle.whole(name, (T, D)).rows(first, first + len(y)), {"values": values})
        for name, values in (("y", y.detach()), ("dx", x.grad))
    ]
    assert mix.weight.main_grad is not None
    mixed = all_reduce_sum(mix.weight.main_grad, mesh.tp)  # as the optimizer does, once a step
    if mesh.tp.rank == 0:
        shards.append(Shard(Rectangle.whole("mix.weight", (D, D)), {"values": mixed}))
    for linear in (up, down):
        assert linear.weight.main_grad is not None
        for rows, where in linear.weight.placement.pieces():
            shards.append(Shard(where, {"values": linear.weight.main_grad[rows]}))
    return shards


def on_rank(rank: int, world_size: int, bug: planted.Bug = nullcontext) -> dict[str, list[Shard]]:
    mesh = mesh_for(rank, world_size, tp=world_size)
    with bug():
        return {name: run(mesh, precision) for name, precision in RECIPES.items()}


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Tensor]]:
    """Recipe -> the logical tensors, from one process."""
    one_process = ParallelMesh.single_process()
    return {
        name: {shard.name: shard.tensors["values"] for shard in run(one_process, precision)}
        for name, precision in RECIPES.items()
    }


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_one_process(tp: int, reference: dict[str, dict[str, Tensor]]) -> None:
    """Off by the number of ranks: a sum too many or too few; by 10%: rounding that knows the layout."""
    ranks = [on_rank(0, 1)] if tp == 1 else run_distributed(on_rank, tp)
    for recipe, logical in reference.items():
        assert_slices(logical, [shards[recipe] for shards in ranks], within=1e-6)


@pytest.mark.parametrize(
    ("bug", "recipe", "at_least"),
    [(planted.local_amax, "nvfp4", 0.05), (planted.summed_twice, "high", 0.5), (planted.rows_kept, "high", 0.5)],
)
def test_would_see(bug: planted.Bug, recipe: str, at_least: float, reference: dict[str, dict[str, Tensor]]) -> None:
    """What exceeds the tolerance above, and by how much."""
    ranks = run_distributed(on_rank, 2, bug)
    assert largest_error(reference[recipe], [shards[recipe] for shards in ranks]) > at_least


def test_print_shows_the_precision() -> None:
    context = LayerContext.of(
        ParallelMesh.single_process(), EmulatedBackend(), StepClock(0), torch.float32, torch.device("cpu")
    )
    model = nn.ModuleDict({"up": ColumnParallelLinear("blocks.0.mlp.up", D, {"": F}, context, std=0.1)})
    assert "(up): ColumnParallelLinear(blocks.0.mlp.up, 64 -> 128, fp32)" in str(model)
    model["up"].precision = nvfp4_paper()  # type: ignore[assignment]
    assert f"(up): ColumnParallelLinear(blocks.0.mlp.up, 64 -> 128, {nvfp4_paper()})" in str(model)


def test_a_weight_gradient_comes_when_it_is_planned() -> None:
    """A deferred one that is computed at once spoils the schedule; one that nobody computes is lost without a word."""
    mesh, x = ParallelMesh.single_process(), torch.randn(T, D, requires_grad=True)
    grads = {}
    for plan in (WgradPlan.now, WgradPlan.deferred):
        context = LayerContext.of(mesh, EmulatedBackend(), StepClock(0), torch.float32, x.device, wgrad=plan)
        up = ColumnParallelLinear("up", D, {"": F}, context, std=0.1)
        initialize_parameters(up, 0)
        up.weight.main_grad = grads[plan] = torch.zeros(F, D)
        up(x, Tokens.of_one_document(T)).sum().backward()
        if context.queue is not None:
            assert not grads[plan].any(), "it did not wait"
            context.queue.drain()
    assert grads[WgradPlan.now].any()
    assert torch.equal(grads[WgradPlan.now], grads[WgradPlan.deferred])
    with pytest.raises(ValueError, match="nothing is scattered"):
        LayerContext.of(mesh, EmulatedBackend(), StepClock(0), x.dtype, x.device, wgrad=WgradPlan.while_scattering)
    with pytest.raises(ValueError, match="wgrad = deferred, but queue = None"):
        replace(lab(), wgrad=WgradPlan.deferred)
