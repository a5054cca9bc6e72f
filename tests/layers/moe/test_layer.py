"""A mixture of experts against its formulas in FP64; full experts, empty ones, one token; computed a second time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fp4 import layers
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import Drop, MoeConfig, RouterScore
from megatron_fp4.layers.moe.layer import MixtureOfExperts
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.layers.recompute import run_recomputed
from megatron_fp4.precision import nvfp4_paper
from tests.layers.moe import reference

HIDDEN, SEQUENCES, LENGTH = 24, 3, 8
ALL_LOSSES = {"sequence_loss": 0.3, "global_loss": 0.2, "z_loss": 0.1}
SMALL = MoeConfig(num_experts=8, top_k=2, ffn_hidden=20, shared_ffn_hidden=12)
CASES = {
    "sigmoid": replace(SMALL, expert_bias=True, **ALL_LOSSES),
    "latent": replace(SMALL, latent=10, scaling_factor=2.5, sequence_loss=0.3),
    "softmax": replace(SMALL, score=RouterScore.softmax, normalize=False, shared_ffn_hidden=0, **ALL_LOSSES),
    "groups": replace(SMALL, num_groups=4, top_groups=2, top_k=3, expert_bias=True, scaling_factor=0.5),
    "one expert": replace(SMALL, num_experts=1, top_k=1, normalize=False),
    "all experts": replace(SMALL, top_k=8, z_loss=0.1),
}


def make(
    config: MoeConfig, context: LayerContext, activation: Activation = Activation.squared_relu
) -> MixtureOfExperts:
    layer = MixtureOfExperts("blocks.0.moe", config, HIDDEN, activation, context, std=0.3, out_std=0.2)
    initialize_parameters(layer, seed=1)
    with torch.no_grad():
        for state in (layer.router.bias, layer.router.overload):
            if state is not None:
                state.copy_(torch.linspace(-0.2, 0.2, len(state)).roll(3))
    context.clock.batch_samples = SEQUENCES
    return layer


def batch() -> tuple[Tensor, Tokens]:
    torch.manual_seed(3)
    ids = torch.arange(SEQUENCES * LENGTH).view(SEQUENCES, LENGTH)
    return torch.randn(SEQUENCES * LENGTH, HIDDEN), Tokens(ids, ids % LENGTH, torch.zeros_like(ids))


def logical(layer: MixtureOfExperts, of: str) -> dict[str, Tensor]:
    """`data` or `grad` of every parameter by its name behind `blocks.0.moe.`, FP64."""
    values: dict[str, Tensor] = {}
    for parameter in layer.parameters():
        assert isinstance(parameter, LogicalParameter)
        for rows, where in parameter.placement.pieces():
            if (tensor := getattr(parameter, of)) is not None:
                values[where.name.removeprefix("blocks.0.moe.")] = tensor.detach()[rows].double()
    return values


def relative(value: Tensor, expected: Tensor) -> float:
    value, expected = value.detach(), expected.detach()
    return float((value - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("case", CASES)
def test_result_and_gradients_are_those_of_the_formulas(case: str, activation: Activation) -> None:
    config = CASES[case]
    layer = make(config, layers.lab(), activation)
    x, tokens = batch()
    x.requires_grad_()
    y = layer(x, tokens)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(4))
    y.backward(slope)

    weights = {name: value.requires_grad_() for name, value in logical(layer, "data").items()}
    x_ref = x.detach().double().requires_grad_()
    y_ref = reference.mixture(x_ref, weights, config, gated=activation is Activation.swiglu)
    ((y_ref * slope).sum() + reference.losses(x_ref, weights, config, SEQUENCES)).backward()
    assert relative(y.double(), y_ref) < 1e-6
    assert x.grad is not None
    assert x_ref.grad is not None
    assert relative(x.grad.double(), x_ref.grad) < 1e-5
    grads = logical(layer, "grad")
    assert grads.keys() == weights.keys() - {"router.bias", "router.overload"}
    for name, grad in grads.items():
        expected = weights[name].grad
        assert relative(grad, torch.zeros_like(grad) if expected is None else expected) < 1e-5, name


def test_means_are_the_losses_without_their_coefficients() -> None:
    config = CASES["sigmoid"]
    layer = make(config, layers.lab())
    x, tokens = batch()
    layer(x, tokens).sum().backward()
    tally = layer.router.tally
    weights = logical(layer, "data")
    for number, name in enumerate(ALL_LOSSES):
        alone = replace(config, **(dict.fromkeys(ALL_LOSSES, 0.0) | {name: 1.0}))
        expected = reference.losses(x.double(), weights, alone, SEQUENCES)
        assert tally.means[number].item() == pytest.approx(expected.item(), rel=1e-6)
    assert tally.counts_E.sum() == config.top_k * len(x)


@pytest.mark.parametrize("full", [False, True])
def test_computed_a_second_time(full: bool) -> None:
    """The same bits, and no token is counted twice; `full` is the whole block, else the experts' activation."""

    def run(recomputed: bool) -> list[Tensor]:
        layer = make(replace(CASES["latent"], latent=16, ffn_hidden=32), layers.lab(dtype=torch.bfloat16))
        layer.experts.up.precision = layer.experts.down.precision = nvfp4_paper()
        layer.experts.recompute_core = recomputed and not full
        x, tokens = batch()
        x = x.bfloat16().requires_grad_()
        run_recomputed(layer, x, tokens, when=recomputed and full).square().sum().backward()
        assert x.grad is not None
        return [x.grad, layer.router.tally.numbers, *logical(layer, "grad").values()]

    for once, twice in zip(run(False), run(True), strict=True):
        assert torch.equal(once, twice)


def test_without_gradients_nothing_is_counted() -> None:
    layer = make(CASES["sigmoid"], layers.lab())
    with torch.no_grad():
        layer(*batch())
    assert not layer.router.tally.numbers.any()


def test_one_token_and_empty_experts() -> None:
    layer = make(SMALL, layers.lab())
    x, _ = batch()
    one = layer(x[:1].requires_grad_(), Tokens.of_one_document(1))
    one.sum().backward()
    gradients = logical(layer, "grad")
    assert sum(bool(gradients[f"experts.{e}.up.weight"].any()) for e in range(8)) <= 2
    assert torch.allclose(one, layer(x, Tokens.of_one_document(len(x)))[:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("drop", list(Drop))
def test_full_experts(drop: Drop) -> None:
    """Every expert has at most its share, and of its rows those that it should keep; whatever the order of the rows."""
    config = replace(SMALL, capacity_factor=0.75, drop=drop, segment_tokens=LENGTH)
    layer = make(config, layers.lab())
    x, tokens = batch()
    routes = layer.router(x, tokens)
    assert routes.kept_Tk is not None
    everything = layer.router(x, replace(tokens, tables={})).experts_Tk
    most = 2  # ceil(0.75 * 2 * 8 / 8)
    for sequence in range(SEQUENCES):
        for expert in range(8):
            queue = [
                (-routes.weights_Tk[t, j].item() if drop is Drop.weight else 0.0, t, j)
                for t in range(sequence * LENGTH, (sequence + 1) * LENGTH)
                for j in range(2)
                if everything[t, j] == expert
            ]
            for place, (_, t, j) in enumerate(sorted(queue)):
                assert bool(routes.kept_Tk[t, j]) == (place < most)
    assert not routes.kept_Tk.all()

    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    others = Tokens(
        *(ids.flatten()[shuffled].view(SEQUENCES, -1) for ids in (tokens.address, tokens.positions)), tokens.documents
    )
    trained = layer(x, tokens)
    assert torch.equal(trained[shuffled], layer(x[shuffled], others))
    trained.sum().backward()  # a dropped row has no gradient
    with torch.no_grad():  # an evaluation is of every row
        everything = layer(x, tokens)
        assert not torch.equal(everything, trained)
        assert torch.equal(everything, make(SMALL, layers.lab())(x, tokens))


def test_nothing_is_dropped_where_there_is_room() -> None:
    x, tokens = batch()
    roomy = make(replace(SMALL, capacity_factor=8.0), layers.lab())
    assert torch.equal(roomy(x, tokens), make(SMALL, layers.lab())(x, tokens))


def test_tokens_of_a_later_round() -> None:
    """Depths of multi-token prediction that share a mixture: the same segments and capacity, other rounding noise."""
    config = replace(CASES["latent"], latent=16, ffn_hidden=32, capacity_factor=0.75, segment_tokens=6)
    layer = make(config, layers.lab(dtype=torch.bfloat16))
    layer.experts.up.precision = layer.experts.down.precision = nvfp4_paper()

    def run(tokens: Tokens) -> tuple[Tensor, Tensor]:
        x = batch()[0].bfloat16().requires_grad_()
        y = layer(x, tokens)
        y.square().sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad

    first, later = (run(tokens) for tokens in (batch()[1], batch()[1].next_round()))
    assert torch.equal(first[0], later[0])
    assert not torch.equal(first[1], later[1])
