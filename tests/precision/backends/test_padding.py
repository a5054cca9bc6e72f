"""Explicit padding: the same numbers as zeros written into larger tensors by hand, or a refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import (
    Dgrad,
    EmulatedBackend,
    Format,
    Fprop,
    LinearPrecision,
    Operand,
    Rounding,
    Sharding,
    StepClock,
    WeightCache,
    Wgrad,
    nvfp4_paper,
    quantized_linear,
)
from megatron_fp4.precision.backends import Copy, OperandOrigin
from megatron_fp4.precision.backends.padded import padded_index
from megatron_fp4.precision.config import BackendName, PrecisionConfig, Rule
from megatron_fp4.precision.plan import PrecisionPlan

T, N, K = 40, 72, 100
FP8, FP8_SQUARE = Operand(Format.fp8_block), Operand(Format.fp8_block, tile=(128, 128))
MXFP4, MXFP4_SR = Operand(Format.mxfp4), Operand(Format.mxfp4, rounding=Rounding.sr)


def with_pad(precision: LinearPrecision) -> LinearPrecision:
    return replace(precision, **{gemm.name: replace(gemm, pad=gemm.quantized) for gemm in precision.gemms})


RECIPES = {
    "paper": (nvfp4_paper(), (16, 16, 16)),
    "one-dimensional": (nvfp4_paper(square_weights=False), (16, 16, 16)),
    "rht without sr": (nvfp4_paper(stochastic=False), (16, 16, 16)),
    "fp8": (LinearPrecision(Fprop(FP8, FP8_SQUARE), Dgrad(FP8, FP8_SQUARE), Wgrad(FP8, FP8)), (128, 128, 128)),
    "mxfp4": (LinearPrecision(Fprop(MXFP4_SR, MXFP4), Dgrad(MXFP4_SR, MXFP4), Wgrad(MXFP4_SR, MXFP4)), (32, 32, 32)),
    "fprop only": (LinearPrecision(fprop=nvfp4_paper().fprop), (1, 16, 16)),
}


def run(
    x: Tensor, w: Tensor, dy: Tensor, precision: LinearPrecision, index: list[Tensor], buffered: bool
) -> tuple[Tensor, ...]:
    """y, dx, dw. index: global indices of tokens, output and input features."""
    single, weight = Group.single(), LogicalParameter.whole("w", w.clone())
    if buffered:
        weight.main_grad = torch.ones_like(w, dtype=torch.float32)
    sharding = Sharding("linear", single, single, single, index[1], index[2])
    settings: dict[str, Any] = {"clock": StepClock(seed=3), "cache": WeightCache(), "backend": EmulatedBackend()}
    x = x.clone().requires_grad_()
    y = quantized_linear(x, weight, rows=index[0], sharding=sharding, precision=precision, **settings)
    y.backward(dy)
    assert x.grad is not None
    assert y.is_contiguous()
    return y.detach(), x.grad, weight.main_grad if buffered else weight.grad


@pytest.mark.parametrize("buffered", [True, False], ids=["main_grad", "grad"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_equals_zeros_written_by_hand(name: str, buffered: bool) -> None:
    """A difference: a wrong dimension was padded, or padding changed an amax, a noise address or the cut."""
    precision, (t, n, k) = RECIPES[name]
    x, w, dy = (
        normal(key_of(part), torch.arange(rows), torch.arange(cols)).bfloat16()
        for part, rows, cols in (("x", T, K), ("w", N, K), ("dy", T, N))
    )
    index = [torch.arange(size) for size in (T, N, K)]
    assert with_pad(precision).padding == (t, n, k)
    ours = run(x, w, dy, with_pad(precision), index, buffered)
    more = [-size % multiple for size, multiple in ((T, t), (N, n), (K, k))]
    larger = (F.pad(part, (0, more[cols], 0, more[rows])) for part, rows, cols in ((x, 0, 2), (w, 1, 2), (dy, 0, 1)))
    # Only stochastic rounding after a transform sees the addresses of the padding (any will do for the other recipes).
    addresses = [padded_index(part, m) for part, m in zip(index, (t, n, k), strict=True)]
    if name not in ("paper", "one-dimensional"):
        addresses = [torch.arange(len(part)) for part in addresses]
    y, dx, dw = run(*larger, precision, addresses, buffered)
    for what, got, expected in zip(("y", "dx", "dw"), ours, (y[:T, :N], dx[:T, :K], dw[:N, :K]), strict=True):
        assert torch.equal(got, expected), what


def test_padded_weights_are_kept_between_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend is wrapped anew in each call: the weight cache must know it again, or quantize in every microbatch."""
    quantize, asked = EmulatedBackend.quantize, []

    def counted(backend: EmulatedBackend, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> Any:
        asked.append(origin.operand)
        return quantize(backend, x, origin, copies)

    monkeypatch.setattr(EmulatedBackend, "quantize", counted)
    single, index = Group.single(), [torch.arange(size) for size in (T, N, K)]
    backend, cache, clock = EmulatedBackend(), WeightCache(), StepClock(seed=3)
    sharding = Sharding("linear", single, single, single, index[1], index[2])

    def linear(x: Tensor, w: Tensor) -> None:
        y = quantized_linear(
            x,
            w,
            rows=index[0],
            sharding=sharding,
            precision=with_pad(nvfp4_paper()),
            backend=backend,
            clock=clock,
            cache=cache,
        )
        assert y.shape == (T, N)

    w = torch.ones(N, K)
    linear(torch.ones(T, K), w)
    linear(torch.ones(T, K), w)
    assert asked == ["x", "w", "x"]
    del w
    for _ in range(20):  # each may get the memory of the one before: it is another weight all the same
        linear(torch.ones(T, K), torch.ones(N, K))
    assert asked == ["x", "w", "x", *20 * ["x", "w"]]


def test_padding_has_addresses_of_its_own() -> None:
    """Two microbatches of the same step, or a token and padding, must not share noise."""
    first, second = padded_index(torch.arange(40), 16), padded_index(torch.arange(40, 80), 16)
    assert len(first) == len(second) == 48
    assert len(set(first.tolist()) | set(second.tolist())) == 96
    assert padded_index(first, 16) is first


def test_without_padding_the_shape_is_refused() -> None:
    x, w = torch.ones(16, 100), torch.ones(32, 100)
    index = [torch.arange(size) for size in (16, 32, 100)]
    with pytest.raises(
        ValueError, match=r"\(16, 100\); its dimension of 100 must be a multiple of 16.*let the GEMM pad"
    ):
        run(x, w, torch.ones(16, 32), nvfp4_paper(), index, False)


def test_padding_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no effect"):
        Fprop(pad=True)


def test_the_plan_takes_any_shape_then() -> None:
    """Of the GEMMs that pad, and of no others; Transformer Engine has no such thing."""
    linears = model_linears(ModelConfig(num_layers=2, pattern="*-", vocab_size=96))

    def plan(precision: LinearPrecision, backend: BackendName = BackendName.emulated) -> PrecisionPlan:
        return PrecisionPlan(PrecisionConfig(backend, recipes={"r": precision}, rules=[Rule("*", use="r")]), linears)

    plan(with_pad(nvfp4_paper())).check_shapes(linears, tp=1, tokens=40)
    half = replace(nvfp4_paper(), fprop=replace(nvfp4_paper().fprop, pad=True))
    with pytest.raises(
        ValueError, match=r"wgrad in nvfp4 needs tokens .*got 40.*: precision\.recipes\.r\.wgrad\.pad=true$"
    ):
        plan(half).check_shapes(linears, tp=1, tokens=40)
    with pytest.raises(ValueError, match=r"precision\.recipes\.r: pad with backend=transformer_engine"):
        plan(with_pad(nvfp4_paper()), BackendName.transformer_engine)
