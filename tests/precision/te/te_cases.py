"""Small stacks of linears in several precisions: what real Transformer Engine modules and the emulation both compute.

Shared by `real_te_check.py`, which runs them through Transformer Engine, and `test_golden.py`, which compares what it
stored with the emulation. Between two linears stands relu(y)^2, so that inner inputs have blocks of zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.models.block import LinearInfo
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import (
    AmaxScope,
    Format,
    FourOverSix,
    Fprop,
    LinearPrecision,
    Operand,
    Sharding,
    Signs,
    StepClock,
    WeightCache,
    Wgrad,
    nvfp4_paper,
    quantized_linear,
    uniform,
)
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.config import HIGH, PrecisionConfig, Rule, Switch
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.table import PrecisionTable

PAPER = nvfp4_paper(stochastic=False)
SHARD = PAPER.with_operands(lambda operand: replace(operand, amax_scope=AmaxScope.shard))
BF16 = LinearPrecision()
OTHER = "other"
TENSOR_PARALLEL, RANKS = "tensor_parallel", 2


@dataclass(frozen=True)
class Layer:
    """A linear `[N, K]` and its precision."""

    N: int
    K: int
    precision: LinearPrecision = PAPER


@dataclass(frozen=True)
class Case:
    """tokens: rows of x. scale: what the Gaussian inputs and gradients are multiplied with, element by element."""

    tokens: int
    layers: tuple[Layer, ...]
    scale: Callable[[Tensor], Tensor] = torch.ones_like


def heavy_tailed(z: Tensor) -> Tensor:
    """Makes z^5: a few elements are hundreds of times larger than the median."""
    return z**4


def sparse(z: Tensor) -> Tensor:
    """Whole 16-blocks of zeros, and magnitudes over 2^24, so that block scales reach their smallest values and zero."""
    rows, columns = torch.arange(z.shape[0])[:, None], torch.arange(z.shape[1])[None, :]
    return torch.exp2(-(columns // 16 * 8 + rows // 16 * 4).float()) * ((columns // 16 + rows // 16) % 3 != 0)


def uneven(z: Tensor) -> Tensor:
    """Grows along both dimensions: every shard of rows or columns has another amax."""
    rows, columns = (torch.linspace(1, 3, size) for size in z.shape)
    return rows[:, None] * columns


def _four_over_six(mode: FourOverSix, bound: int = 256) -> LinearPrecision:
    return uniform(Operand(Format.nvfp4, four_over_six=mode, four_over_six_bound=bound))


CASES = {
    "paper": Case(64, (Layer(96, 128),)),
    "stacked_with_bf16": Case(32, (Layer(64, 32), Layer(32, 64), Layer(32, 32, BF16))),
    "no_rht": Case(32, (Layer(96, 64, nvfp4_paper(stochastic=False, rht=False)),)),
    "weights_1d": Case(32, (Layer(64, 96, nvfp4_paper(stochastic=False, square_weights=False)),)),
    "no_signs": Case(
        32,
        (Layer(32, 64, replace(PAPER, wgrad=Wgrad(*[Operand(Format.nvfp4, rht_size=16, rht_signs=Signs.none)] * 2))),),
    ),
    "heavy_tailed": Case(64, (Layer(64, 96), Layer(32, 64)), heavy_tailed),
    "sparse": Case(64, (Layer(64, 96),), sparse),
    "bf16_forward": Case(
        32, (Layer(64, 32, replace(PAPER, fprop=Fprop())), Layer(32, 64, replace(PAPER, fprop=Fprop())))
    ),
    "bf16_backward": Case(32, (Layer(32, 64, LinearPrecision(PAPER.fprop)),)),
    "bf16_wgrad": Case(32, (Layer(32, 64, replace(PAPER, wgrad=Wgrad())),)),
    TENSOR_PARALLEL: Case(64, (Layer(128, 64, SHARD), Layer(64, 128, SHARD)), uneven),
    "four_over_six_mae": Case(32, (Layer(32, 64, _four_over_six(FourOverSix.mae)),)),
    "four_over_six_mse_448": Case(32, (Layer(32, 64, _four_over_six(FourOverSix.mse, 448)),)),
}


def names(case: Case) -> list[str]:
    """Of the linears, as a precision table has them."""
    return [f"blocks.{index}.mlp.up" for index in range(len(case.layers))]


def inputs(name: str) -> dict[str, Tensor]:
    """BF16 x `[T, K]`, dy `[T, N]`, and one w`i` `[N, K]` per layer."""
    case = CASES[name]
    shapes = {"x": (case.tokens, case.layers[0].K), "dy": (case.tokens, case.layers[-1].N)}
    shapes |= {f"w{index}": (layer.N, layer.K) for index, layer in enumerate(case.layers)}
    tensors = {}
    for tensor, shape in shapes.items():
        z = normal(key_of("te_cases", name, tensor), *(torch.arange(size) for size in shape))
        tensors[tensor] = (z * case.scale(z) * (shape[1] ** -0.5 if tensor.startswith("w") else 1.0)).bfloat16()
    return tensors


def plan(name: str, *switches: Switch) -> PrecisionPlan:
    """The precision plan of a model that consists of the case's linears. Switches may use the recipe `OTHER`."""
    case = CASES[name]
    linears = [
        LinearInfo(linear, index, layer.K, {"up": layer.N}, column=True)
        for index, (linear, layer) in enumerate(zip(names(case), case.layers, strict=True))
    ]
    recipes = {f"r{i}": layer.precision for i, layer in enumerate(case.layers) if layer.precision.quantized}
    rules = [Rule(linear, use=f"r{i}" if f"r{i}" in recipes else HIGH) for i, linear in enumerate(names(case))]
    recipes |= {OTHER: nvfp4_paper(stochastic=False, rht=False)} if switches else {}
    return PrecisionPlan(PrecisionConfig(recipes=recipes, rules=rules, switch=list(switches)), linears)


def forward_backward(
    tensors: dict[str, Tensor], linears: Sequence[Callable[[Tensor], Tensor]], weights: Sequence[torch.nn.Parameter]
) -> dict[str, Tensor]:
    """y`i` and dw`i` per layer, and dx. linears: made from `weights`."""
    x = hidden = tensors["x"].clone().requires_grad_()
    results = {}
    for index, linear in enumerate(linears):
        hidden = linear(torch.relu(hidden).square() if index else hidden)
        results[f"y{index}"] = hidden.detach()
    hidden.backward(tensors["dy"])
    assert x.grad is not None
    results["dx"] = x.grad
    for index, weight in enumerate(weights):
        assert weight.grad is not None
        results[f"dw{index}"] = weight.grad
    return results


def main_grad(tensors: dict[str, Tensor], linear: Callable[[Tensor], Tensor], weight: torch.nn.Parameter) -> Tensor:
    """FP32 gradient of the weight after two microbatches, accumulated in place."""
    grad = torch.zeros(weight.shape)
    weight.main_grad = grad
    for sign in (1, -3):
        linear((tensors["x"] * sign).requires_grad_()).backward(tensors["dy"])
    return grad


def our_linear(
    name: str, index: int, backend: Backend, weight: torch.nn.Parameter, precision: LinearPrecision | None = None
) -> Callable[[Tensor], Tensor]:
    """A linear of the case through `quantized_linear`. precision: another than the case's."""
    case, single = CASES[name], Group.single()
    return functools.partial(
        quantized_linear,
        weight=weight,
        rows=torch.arange(case.tokens),
        sharding=Sharding(names(case)[index], single, single, single, *map(torch.arange, weight.shape)),
        precision=precision or case.layers[index].precision,
        backend=backend,
        clock=StepClock(seed=1),
        cache=WeightCache(),
    )


def run_ours(
    name: str, backend: Backend, tensors: dict[str, Tensor], table: PrecisionTable | None = None
) -> dict[str, Tensor]:
    """The case through `quantized_linear`. table: precisions, if not the case's own."""
    case = CASES[name]
    weights = [torch.nn.Parameter(tensors[f"w{index}"].clone()) for index in range(len(case.layers))]
    linears = [
        our_linear(name, index, backend, weight, table[names(case)[index]] if table else None)
        for index, weight in enumerate(weights)
    ]
    return forward_backward(tensors, linears, weights)


def run_ours_sharded(backend: Backend, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The case `TENSOR_PARALLEL` as `RANKS` tensor-parallel ranks with sequence parallelism, one after the other.

    The first linear is column-parallel, the second row-parallel; partial sums are added in BF16, as a reduce-scatter
    does. Of y1 and dx each rank has its shard of the rows.
    """
    x = tensors["x"].clone().requires_grad_()
    ranks, parts = [], []
    for rank in range(RANKS):
        shards = (tensors["w0"].chunk(RANKS)[rank], tensors["w1"].chunk(RANKS, 1)[rank].contiguous())
        up, down = (torch.nn.Parameter(shard.clone()) for shard in shards)
        hidden = our_linear(TENSOR_PARALLEL, 0, backend, up)(x)
        parts.append(our_linear(TENSOR_PARALLEL, 1, backend, down)(torch.relu(hidden).square()))
        ranks.append((hidden, up, down))
    y = torch.stack(parts).sum(0)
    y.backward(tensors["dy"])
    results = []
    for rank, (hidden, up, down) in enumerate(ranks):
        assert x.grad is not None
        assert up.grad is not None
        assert down.grad is not None
        rows = {"y1": y.detach().chunk(RANKS)[rank], "dx": x.grad.chunk(RANKS)[rank]}
        results.append({"y0": hidden.detach(), **rows, "dw0": up.grad, "dw1": down.grad})
    return results
