"""MS-EDEN: half of stochastic rounding's error, without its bias, and the same numbers in every layout."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.numerics.hadamard import hadamard
from megatron_fp4.precision import (
    Dgrad,
    EmulatedBackend,
    Format,
    FourOverSix,
    Fprop,
    LinearPrecision,
    Operand,
    Rounding,
    Sharding,
    Signs,
    StepClock,
    WeightCache,
    Wgrad,
    nvfp4_paper,
    quantized_linear,
)
from megatron_fp4.precision.backends import Copy, OperandOrigin, finite
from megatron_fp4.precision.backends.randomness import signs_for, with_signs
from megatron_fp4.precision.config import PrecisionConfig, Switch
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.recipes import nvfp4_ms_eden
from megatron_fp4.precision.statistics import quantization_stats

EDEN = Operand(Format.nvfp4, rounding=Rounding.ms_eden, rht_size=128, rht_signs=Signs.per_index)
SR, SR_HEADROOM = (Operand(Format.nvfp4, rounding=one) for one in (Rounding.sr, Rounding.sr_headroom))
SINGLE = Group.single()
T, N, K = 256, 256, 256


def gaussian(name: str, rows: int, columns: int) -> Tensor:
    return normal(key_of(name), torch.arange(rows), torch.arange(columns))


def outlying(name: str, rows: int, columns: int) -> Tensor:
    """A few columns are thirty times larger, as activations and gradients have them."""
    return gaussian(name, rows, columns) * torch.where(torch.arange(columns) % 61 == 3, 30.0, 1.0)


def decoded(x: Tensor, operand: Operand, step: int, along: int = 1) -> Tensor:
    """What an operand stands for, FP64 in x's layout: decoded, and its transform undone."""
    backend, copy = EmulatedBackend(), Copy("dgrad", operand, along)
    rows, cols = (torch.arange(size) for size in x.shape)
    origin = OperandOrigin("blocks.0.mlp.up", "dy", rows, cols, SINGLE, seed=1, step=step)
    values, scale = backend.values(backend.quantize(x, origin, [copy])[0])
    assert scale is not None
    turned = (values if along == 1 else values.T).double() * (scale.amax.double() / scale.divisor)
    if not operand.rht_size:
        return turned
    turned, signs = hadamard(turned, operand.rht_size, None, along), signs_for(origin, operand, x.device)
    if signs is not None:
        turned = (turned.unflatten(along, (-1, operand.rht_size)) * (signs if along == 1 else signs[:, None])).flatten(
            along, along + 1
        )
    return with_signs(turned, origin, copy)


def left_of_mean(x: Tensor, operand: Operand, draws: int, along: int = 1) -> float:
    """Energy of the error of the mean of many draws, as a part of that of one draw."""
    tensor = x if along == 1 else x.T.contiguous()
    errors = torch.stack([decoded(tensor, operand, step, along) for step in range(draws)]) - tensor.double()
    return (errors.mean(0).square().sum() / errors.square().sum((1, 2)).mean()).item()


@pytest.mark.parametrize(
    ("operand", "along"),
    [(EDEN, 1), (EDEN, 0), (replace(EDEN, rht_size=64, rht_signs=Signs.per_step), 1), (SR_HEADROOM, 1)],
    ids=str,
)
def test_the_mean_of_many_draws_is_the_tensor(operand: Operand, along: int) -> None:
    """Unbiased noise leaves 1/n of its energy in the mean of n draws; the bias of nearest rounding stays whole.

    The limit: n times that part has mean 1 and, with more than 1,000 independent errors, a standard deviation below
    0.05. Nearest rounding gives n, Transformer Engine's clipped rounding 1 + 0.004 n.
    """
    draws = 96
    ratio = draws * left_of_mean(gaussian("x", 16, 256), operand, draws, along)
    assert 0.8 < ratio < 1.2, ratio


def test_outliers_leave_a_hundredth_of_its_error() -> None:
    """A Hadamard transform is no uniform rotation: of a group that two elements rule the errors do not all cancel."""
    draws = 96
    assert left_of_mean(outlying("x", 16, 256), EDEN, draws) < 0.03 + 1 / draws


def test_its_error_is_half_of_stochastic_roundings() -> None:
    """Of docs/quantizers.md. SR without bias: sr_headroom; TE's is clipped, so it is biased and a little smaller."""
    x = gaussian("mse", 256, 1024)
    eden, headroom, clipped = (quantization_stats(x, one).relative_mse for one in (EDEN, SR_HEADROOM, SR))
    assert eden < 0.5 * headroom
    assert eden < 0.55 * clipped
    assert quantization_stats(x, replace(EDEN, four_over_six=FourOverSix.mse)).relative_mse < 0.45 * clipped


def test_small_blocks_are_not_flushed() -> None:
    """Blocks 2^19 times smaller than the largest one: their nearest E4M3 scale is zero, and all would be lost."""
    x = gaussian("x", 16, 256)
    x[:, 128:] *= 2.0**-19
    assert not decoded(x, Operand(Format.nvfp4), 0)[:, 128:].any()
    mean = torch.stack([decoded(x, EDEN, step)[:, 128:] for step in range(32)]).mean(0)
    assert ((mean - x[:, 128:]).norm() / x[:, 128:].norm()).item() < 0.3


class Linear:
    """A weight with what a layer would hold."""

    def __init__(self, w: Tensor, precision: LinearPrecision, rows: slice = slice(0, T), **parts: Any) -> None:
        self.weight, self.precision = LogicalParameter.whole("w", w.clone()), precision
        self.clock, self.cache, self.backend = StepClock(seed=3, step=7), WeightCache(), EmulatedBackend()
        self.rows = torch.arange(T)[rows]
        whole = {"x_group": SINGLE, "w_group": SINGLE, "dy_group": SINGLE}
        index = {"n_index": torch.arange(w.shape[0]), "k_index": torch.arange(w.shape[1])}
        self.sharding = Sharding("blocks.0.mlp.up", **{**whole, **index, **parts})

    def __call__(self, x: Tensor) -> Tensor:
        return quantized_linear(
            x,
            self.weight,
            rows=self.rows,
            sharding=self.sharding,
            precision=self.precision,
            backend=self.backend,
            clock=self.clock,
            cache=self.cache,
        )

    def run(self, x: Tensor, dy: Tensor, wrap: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and the FP32 dw."""
        self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        x = x.clone().requires_grad_()
        y = self(x) if wrap is None else wrap(self, x)
        y.backward(dy)
        assert x.grad is not None
        return y.detach(), x.grad, self.weight.main_grad


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(outlying(name, *shape).bfloat16() for name, shape in {"x": (T, K), "w": (N, K), "dy": (T, N)}.items())  # type: ignore[return-value]


def recomputed(linear: Linear, x: Tensor) -> Tensor:
    result: Tensor = checkpoint(linear, x, use_reentrant=False)
    return result


def test_gradients_are_right_repeat_and_differ_by_step() -> None:
    """The transforms of both operands cancel; a recomputed pass, and one of a process that starts here, are equal."""
    x, w, dy = tensors()
    linear = Linear(w, nvfp4_ms_eden())
    y, dx, dw = linear.run(x, dy)
    for name, ours, theirs in (("dx", dx, dy.double() @ w.double()), ("dw", dw, dy.double().T @ x.double())):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() < 0.2, name
    for same in (Linear(w, nvfp4_ms_eden()).run(x, dy), Linear(w, nvfp4_ms_eden()).run(x, dy, recomputed)):
        for expected, got in zip((y, dx, dw), same, strict=True):
            assert torch.equal(expected, got)
    linear.clock.step += 1
    later = linear.run(x, dy)
    assert torch.equal(y, later[0]), "the forward pass is rounded to nearest"
    assert not torch.equal(dx, later[1])
    assert not torch.equal(dw, later[2])


def test_each_token_and_gemm_has_signs_of_its_own() -> None:
    """Of another microbatch (other tokens), step, linear and GEMM; a common vector would make their errors alike."""
    ones = torch.ones(16, 256)
    place = OperandOrigin("a", "dy", torch.arange(16), torch.arange(256), SINGLE, seed=1, step=0)
    copy = Copy("dgrad", EDEN, 1)
    others = [
        (replace(place, cols=place.cols + 256), copy),
        (replace(place, step=1), copy),
        (replace(place, name="b"), copy),
        (place, replace(copy, gemm="wgrad")),
    ]
    signs = with_signs(ones, place, copy)
    for origin, which in others:
        share = (with_signs(ones, origin, which)[0] == signs[0]).float().mean().item()
        assert 0.35 < share < 0.65, (origin.name, origin.step, which.gemm)
    of_weight = replace(place, operand="w", rows=place.cols, cols=torch.arange(32), expert=3)
    assert torch.equal(with_signs(torch.ones(256, 32), of_weight, Copy("dgrad", EDEN, 0))[:, 0], signs[0])


class Exchange:
    """Two ranks as threads: the only message of a linear is its amaxes."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.parts: dict[int, Tensor] = {}

    def all_reduce_max(self, local: Tensor, group: Group) -> Tensor:
        self.parts[group.rank] = local
        self.barrier.wait()
        both = torch.maximum(self.parts[0], self.parts[1])
        self.barrier.wait()
        return both

    def all_reduce_sum(self, local: Tensor, group: Group) -> Tensor:
        self.parts[group.rank] = local
        self.barrier.wait()
        both = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return both

    def ranks(self, run: Callable[[int], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
        results: dict[int, Sequence[Tensor]] = {}
        threads = [threading.Thread(target=lambda rank=rank: results.update({rank: run(rank)})) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[0], results[1]]


@pytest.mark.parametrize("layout", ["column", "row", "tokens"])
def test_every_layout_sees_the_same_operands(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of the transform lie whole on a rank, their signs and noise at logical addresses."""
    exchange = Exchange()
    monkeypatch.setattr(finite, "all_reduce_max", exchange.all_reduce_max)
    x, w, dy = tensors()

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        group = Group("both", (0, 1), rank, object())  # type: ignore[arg-type]
        part = slice(rank * 128, rank * 128 + 128)
        if layout == "column":
            linear = Linear(w[part], nvfp4_ms_eden(), w_group=group, dy_group=group, n_index=torch.arange(N)[part])
            return linear.run(x, dy[:, part].contiguous())
        if layout == "row":
            index = torch.arange(K)[part]
            linear = Linear(w[:, part].contiguous(), nvfp4_ms_eden(), w_group=group, x_group=group, k_index=index)
            return linear.run(x[:, part].contiguous(), dy)
        linear = Linear(w, nvfp4_ms_eden(), rows=part, x_group=group, dy_group=group)
        return linear.run(x[part], dy[part])

    whole = Linear(w, nvfp4_ms_eden()).run(x, dy)
    first, second = exchange.ranks(run)
    join = {"column": (1, None, 0), "row": (None, 1, 1), "tokens": (0, 0, None)}[layout]
    for name, expected, a, b, dim in zip(("y", "dx", "dw"), whole, first, second, join, strict=True):
        if dim is None:
            error = ((a.float() + b.float() - expected.float()).norm() / expected.float().norm()).item()
            assert error < (2e-6 if name == "dw" else 5e-3), f"{name}: sum of parts is off by {error}"
        else:
            assert torch.equal(torch.cat([a, b], dim), expected), f"{name}: parts are not slices of the whole"


def test_arms_of_one_gemm_can_be_told_apart() -> None:
    """Each changes its gradient alone: an operand in high precision takes part in the other one's transform."""
    x, w, dy = tensors()
    high = Operand(rht_size=128, rht_signs=Signs.per_index)
    exact = Linear(w, LinearPrecision()).run(x, dy)
    arms = {
        "dgrad": LinearPrecision(dgrad=Dgrad(EDEN, EDEN)),
        "dgrad, the weight in high precision": LinearPrecision(dgrad=Dgrad(EDEN, high)),
        "wgrad": LinearPrecision(wgrad=Wgrad(EDEN, EDEN)),
        "wgrad, x in high precision": LinearPrecision(wgrad=Wgrad(EDEN, high)),
    }
    errors = {}
    for name, precision in arms.items():
        results = Linear(w, precision).run(x, dy)
        equal = [torch.equal(ours, theirs) for ours, theirs in zip(results, exact, strict=True)]
        assert equal == [True, not name.startswith("dgrad"), not name.startswith("wgrad")], name
        which = 1 if name.startswith("dgrad") else 2
        errors[name] = ((results[which] - exact[which]).float().norm() / exact[which].float().norm()).item()
    assert errors["dgrad, the weight in high precision"] < 0.85 * errors["dgrad"] < 0.2
    assert errors["wgrad, x in high precision"] < 0.85 * errors["wgrad"] < 0.2


def test_quantizers_change_in_the_course_of_a_run() -> None:
    """At a number of tokens, for some linears and GEMMs; from there on it is what a run computes that begins there."""
    switch = Switch(at_tokens=1000, match="*.mlp.*", gemms=["dgrad", "wgrad"], use="eden")
    config = PrecisionConfig(recipes={"nvfp4": nvfp4_paper(), "eden": nvfp4_ms_eden()}, use="nvfp4", switch=[switch])
    plan = PrecisionPlan(config, model_linears(ModelConfig(num_layers=2, vocab_size=96)), total_tokens=10_000)
    before, after = (plan.table(plan.phase_at(tokens)) for tokens in (999, 1000))
    assert after["blocks.1.attention.qkv"] == before["blocks.1.attention.qkv"] == nvfp4_paper()
    assert after["blocks.1.mlp.up"] == nvfp4_ms_eden()
    assert "sr, w nvfp4 16x16 | wgrad dy nvfp4 sr rht16" in plan.describe()
    assert "-> dgrad dy nvfp4 ms_eden rht128 rht_signs=per_index" in plan.describe()
    x, w, dy = tensors()
    linear = Linear(w, before["blocks.1.mlp.up"])
    linear.run(x, dy)
    linear.clock.step, linear.precision = 8, after["blocks.1.mlp.up"]
    fresh = Linear(w, nvfp4_ms_eden())
    fresh.clock.step = 8
    for expected, got in zip(fresh.run(x, dy), linear.run(x, dy), strict=True):
        assert torch.equal(expected, got)


def test_a_transform_where_nothing_is_quantized_is_refused() -> None:
    turned = Operand(rht_size=16)
    with pytest.raises(ValueError, match="nothing is quantized, so rht_size would have no effect"):
        Fprop(turned, turned)
    assert nvfp4_paper() != nvfp4_ms_eden()
