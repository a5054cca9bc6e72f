"""A column- and a row-parallel linear at tp 1, 2 and 4: output, input gradient and weight gradients of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.precision import EmulatedBackend, nvfp4_paper
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.spec import LinearPrecision
from tests.helpers.distributed import mesh_for, run_distributed

T, D, F = 64, 64, 128
RECIPES = {"high": LinearPrecision(), "nvfp4": nvfp4_paper()}


def run(mesh: ParallelMesh, precision: LinearPrecision, dtype: torch.dtype) -> dict[str, Any]:
    """My rows of y and dx, and the rectangles of dw that my weights are: name -> [(offset, values)]."""
    context = LayerContext.of(mesh, EmulatedBackend(), StepClock(0), dtype, torch.device("cpu"))
    up = ColumnParallelLinear("up", D, {"gate": F, "": F}, context, std=0.1)
    down = RowParallelLinear("down", F, D, context, std=0.1)
    initialize_parameters(nn.ModuleList([up, down]), 0)
    random = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(T, D, generator=random).to(dtype).chunk(mesh.tp.size)[mesh.tp.rank] for _ in "xy")
    ids = torch.arange(T).view(1, T)
    tokens = Tokens(ids, ids, torch.zeros_like(ids))
    for linear in (up, down):
        linear.precision = precision
        linear.weight.main_grad = torch.zeros(linear.weight.shape, dtype=torch.float64)
    x = x.clone().requires_grad_()
    gate, h = up(x, tokens).chunk(2, dim=-1)
    y = down(gate * h, tokens)
    y.backward(dy)
    found: dict[str, Any] = {"y": [((mesh.tp.rank * len(y), 0), y.detach())]}
    assert x.grad is not None
    found["dx"] = [((mesh.tp.rank * len(y), 0), x.grad)]
    for linear in (up, down):
        for rows, where in linear.weight.placement.pieces():
            found[where.name] = [(where.offset, linear.weight.main_grad[rows])]
    return found


def all_cases(rank: int, world_size: int) -> dict[str, Any]:
    mesh = mesh_for(rank, world_size, tp=world_size)
    return {name: as_lists(run(mesh, precision, torch.float32)) for name, precision in RECIPES.items()}


def as_lists(found: dict[str, Any]) -> dict[str, Any]:
    return {name: [(offset, values.tolist()) for offset, values in parts] for name, parts in found.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_linear_at_any_tensor_parallel_size(tp: int) -> None:
    """Off by the number of ranks: a sum too many or too few; by 10%: rounding that knows the layout."""
    ranks = [all_cases(0, 1)] if tp == 1 else run_distributed(all_cases, tp)
    for recipe, precision in RECIPES.items():
        for name, parts in run(ParallelMesh.single_process(), precision, torch.float32).items():
            ((_, whole),) = parts
            covered = torch.zeros(whole.shape)
            for found in ranks:
                for offset, rows in found[recipe][name]:
                    values = torch.tensor(rows, dtype=whole.dtype)
                    place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
                    covered[place] += 1
                    error = relative(values, whole[place])
                    assert error < 1e-6, f"{recipe}, {name}: off by {error:.1e}"
            assert bool((covered == 1).all()), f"{name}: not every element was computed once"


def relative(values: Tensor, expected: Tensor) -> float:
    return float((values - expected).norm() / expected.norm())


def test_print_shows_the_precision() -> None:
    context = LayerContext.of(
        ParallelMesh.single_process(), EmulatedBackend(), StepClock(0), torch.float32, torch.device("cpu")
    )
    model = nn.ModuleDict({"up": ColumnParallelLinear("blocks.0.mlp.up", D, {"": F}, context, std=0.1)})
    assert "(up): ColumnParallelLinear(blocks.0.mlp.up, 64 -> 128, bf16)" in str(model)
    model["up"].precision = nvfp4_paper()  # type: ignore[assignment]
    assert f"(up): ColumnParallelLinear(blocks.0.mlp.up, 64 -> 128, {nvfp4_paper()})" in str(model)
