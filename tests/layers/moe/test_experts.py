"""Experts as a layer: names, initial values, precision, and gradients against FP64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.comm.mesh import DrawnGroup, Group
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.layers import lab
from megatron_fp4.layers.linear import assign_precision, linears_of
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.experts import GroupedExperts
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.planning.footprint import LiveBytes
from megatron_fp4.precision import EmulatedBackend, LinearPrecision, nvfp4_paper
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.grouped import Segments
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend
from megatron_fp4.precision.table import PrecisionTable, Row

D, FFN, E = 32, 48, 4
NAME = "blocks.1.moe.experts"


def experts_of(
    activation: Activation, ep: Group | None = None, dtype: torch.dtype = torch.float32, ffn_hidden: int = FFN
) -> GroupedExperts:
    context = replace(lab(), dtype=dtype)
    ep = ep or Group.single("ep")
    layer = GroupedExperts(NAME, D, ffn_hidden, activation, context, num_experts=E, ep=ep, std=0.1, out_std=0.1)
    initialize_parameters(layer, seed=3)
    return layer


def routed() -> tuple[Tensor, Tensor, Tensor, Segments]:
    """x, router weights, addresses, segments: an empty expert, one token, two sources."""
    segments = Segments.of_counts([[5, 9], [0, 0], [1, 0], [7, 3]])
    rows = torch.arange(segments.num_rows)
    x = normal(key_of("x"), rows, torch.arange(D)).requires_grad_()
    weight = (normal(key_of("p"), rows, torch.arange(1))[:, 0].abs() + 0.1).requires_grad_()
    return x, weight, rows, segments


def exact(layer: GroupedExperts, x: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """In FP64, a row at a time."""
    chosen = segments.experts(x.device)
    up = layer.up.weight.double().view(E, -1, D)[chosen]
    down = layer.down.weight.double().view(E, D, FFN)[chosen]
    u = torch.einsum("rd,rfd->rf", x, up)
    act = F.relu(u).square() if u.shape[1] == FFN else F.silu(u[:, :FFN]) * u[:, FFN:]
    return torch.einsum("rf,rdf->rd", act * weight[:, None], down)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("recompute", [False, True])
def test_proof_mode_agrees_with_fp64(activation: Activation, recompute: bool) -> None:
    """y and every gradient, that of the router's weight too."""
    layer = experts_of(activation)
    layer.recompute_core = recompute
    x, weight, rows, segments = routed()
    y = layer(x, weight, rows, segments)
    dy = normal(key_of("dy"), rows, torch.arange(D))
    parameters = list(logical_parameters(layer))
    ours = torch.autograd.grad(y, [x, weight, *parameters], dy)
    x64, weight64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    y64 = exact(layer, x64, weight64, segments)
    theirs = torch.autograd.grad(y64, [x64, weight64, *parameters], dy.double())
    for one, other in zip((y, *ours), (y64, *theirs), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [SegmentedEmulatedBackend(compile=False), EmulatedBackend(compile=False)])
def test_with_recomputation_only_what_enters_the_activation_is_kept(backend: Backend) -> None:
    """No result of the activation, and none with zeros between its segments either, of which there are many here."""
    segments = Segments.of_counts([[1, 1] for _ in range(E)])
    rows = torch.arange(segments.num_rows)
    kept, results = list[int](), list[list[Tensor | None]]()
    for recompute in (False, True):
        layer = experts_of(Activation.squared_relu, dtype=torch.bfloat16, ffn_hidden=1024)
        layer.recompute_core = recompute
        for linear in (layer.up, layer.down):
            linear.precision = nvfp4_paper()
            linear._context = replace(linear._context, backend=backend)
        x = normal(key_of("x"), rows, torch.arange(D)).bfloat16().requires_grad_()
        layer(x, torch.ones(len(rows)), rows, segments)  # weights are quantized
        with LiveBytes() as live:
            y = layer(x, torch.ones(len(rows)), rows, segments)
            kept.append(live.now)
        y.sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    u = len(rows) * 1024 * 2
    assert kept[1] < 1.5 * u, "beside it the result and some addresses"
    assert kept[0] > 2 * u
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_one_logical_tensor_per_expert() -> None:
    names = [where.name for p in logical_parameters(experts_of(Activation.swiglu)) for where in p.placement.rectangles]
    up = [f"{NAME}.{e}.gate_up.{part}.weight" for e in range(E) for part in ("gate", "up")]
    assert names == [*up, *(f"{NAME}.{e}.down.weight" for e in range(E))]


def test_an_expert_is_the_same_on_any_rank() -> None:
    """Initial values and numbers, noise included: expert 2 alone on rank 1 of 2, and beside all others."""
    whole = experts_of(Activation.squared_relu, dtype=torch.bfloat16)
    half = experts_of(Activation.squared_relu, DrawnGroup("ep", (0, 1), 1), dtype=torch.bfloat16)
    assert torch.equal(half.up.weight, whole.up.weight[2 * FFN :])
    for layer in (whole, half):
        for linear in linears_of(layer).values():
            linear.precision = nvfp4_paper()
    x, weight, rows, segments = routed()
    x = x.detach().bfloat16()
    first = segments.parts[2].start
    own_segments = Segments.of_counts([[1, 0], [7, 3]])
    results = []
    for layer, begin, own in ((whole, 0, segments), (half, first, own_segments)):
        part = x[begin:].clone().requires_grad_()
        y = layer(part, weight.detach()[begin:], rows[begin:], own)
        y.float().square().sum().backward()
        assert part.grad is not None
        results.append((y[first - begin :], part.grad[first - begin :], layer.up.weight.grad, layer.down.weight.grad))
    (y, dx, up, down), (half_y, half_dx, half_up, half_down) = results
    assert torch.equal(y, half_y)
    assert torch.equal(dx, half_dx)
    assert up is not None
    assert down is not None
    assert torch.equal(up[2 * FFN :], half_up)
    assert torch.equal(down[2 * D :], half_down)


def test_precision_is_assigned_to_all_experts_of_a_linear() -> None:
    layer = experts_of(Activation.squared_relu)
    assert list(linears_of(layer)) == [f"{NAME}.up", f"{NAME}.down"]
    rows = [Row(f"{NAME}.up", nvfp4_paper(), "rule"), Row(f"{NAME}.down", LinearPrecision(), "rule")]
    assign_precision(layer, PrecisionTable(tuple(rows)))
    assert layer.up.precision == nvfp4_paper()
    assert f"GroupedLinear({NAME}.up, 32 -> 48, {nvfp4_paper()}, 4 experts)" in str(layer)


def test_experts_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"number of experts = 4 is not divisible by ep = 3"):
        experts_of(Activation.squared_relu, DrawnGroup("ep", (0, 1, 2), 1))
