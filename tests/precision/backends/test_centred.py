"""Activations without their mean: exact but for the rounding of what is left, the same in every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.precision import EmulatedBackend, Format, Fprop, LinearPrecision, Operand, Wgrad, nvfp4_paper
from megatron_fp4.precision.backends import Backend, Copy, OperandOrigin, QuantizedOperand, centred, finite
from megatron_fp4.precision.backends.centred import CentredBackend
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend
from tests.precision.grouped.test_grouped_linear import COUNTS, Experts, routed
from tests.precision.test_ms_eden import Exchange, K, Linear, N, T, gaussian, tensors


def centering(precision: LinearPrecision) -> LinearPrecision:
    fprop, wgrad = (replace(gemm, x=replace(gemm.x, center=True)) for gemm in (precision.fprop, precision.wgrad))
    return replace(precision, fprop=fprop, wgrad=wgrad)


@dataclass(frozen=True)
class Exact:
    """A quantizer that is the identity; the transforms of both operands are left out, as they cancel."""

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        exact = [replace(copy, operand=Operand(rht_size=copy.operand.rht_size)) for copy in copies]
        return ReferenceBackend().quantize(x, origin, exact)

    def matmul(self, a: QuantizedOperand, b: QuantizedOperand, **how: Any) -> Tensor:
        return ReferenceBackend().matmul(a, b, **how)


@pytest.mark.parametrize("rht", [0, 16], ids=["", "transformed"])
def test_without_rounding_the_product_is_that_of_the_tensors(rht: int) -> None:
    """Integers, and a mean that is one: all sums are exact, so a forgotten part would show."""
    gen = torch.Generator().manual_seed(1)
    x, w, dy = (torch.randint(-8, 9, shape, generator=gen).float() for shape in ((T, K), (N, K), (T, N)))
    x[-1] -= x.sum(0) - T * torch.randint(-3, 4, (K,), generator=gen)
    operand = Operand(Format.nvfp4, rht_size=rht)
    turned = replace(operand, center=True)
    linear = Linear(w, LinearPrecision(Fprop(turned, operand), wgrad=Wgrad(operand, turned)))
    linear.backend = CentredBackend(Exact())  # type: ignore[assignment]
    y, dx, dw = linear.run(x, dy)
    for name, ours, theirs in (("y", y, x @ w.T), ("dx", dx, dy @ w), ("dw", dw, dy.T @ x)):
        assert torch.equal(ours, theirs), name


def test_a_mean_costs_no_precision() -> None:
    """A planted mean of ten standard deviations takes the codes of a plain quantizer, and none of this one's."""
    w, dy = tensors()[1:]
    x = (gaussian("x", T, K) + 10 * gaussian("m", 1, K)).bfloat16()
    exact = x.double() @ w.double().T, dy.double().T @ x.double()
    recipe = LinearPrecision(Fprop(Operand(Format.nvfp4), Operand()), wgrad=Wgrad(Operand(), Operand(Format.nvfp4)))
    errors = []
    for precision in (recipe, centering(recipe)):
        linear = Linear(w, precision)
        linear.backend = CentredBackend(EmulatedBackend())  # type: ignore[assignment]
        y, _, dw = linear.run(x, dy)
        errors.append([((got.double() - e).norm() / e.norm()).item() for got, e in zip((y, dw), exact, strict=True)])
    for plain, centred_error in zip(*errors, strict=True):
        assert centred_error < 0.25 * plain


@pytest.mark.parametrize("layout", ["row", "tokens"])
def test_the_mean_is_that_of_the_whole_microbatch(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a rank's own tokens it would be another one, and with it every code."""
    largest, sums = Exchange(), Exchange()
    monkeypatch.setattr(finite, "all_reduce_max", largest.all_reduce_max)
    monkeypatch.setattr(centred, "all_reduce_sum", sums.all_reduce_sum)
    x, w, dy = tensors()
    precision = centering(nvfp4_paper())

    def linear(weight: Tensor, **parts: Any) -> Linear:
        split = Linear(weight, precision, **parts)
        split.backend = CentredBackend(EmulatedBackend())  # type: ignore[assignment]
        return split

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        group = Group("both", (0, 1), rank, object())  # type: ignore[arg-type]
        part = slice(rank * 128, rank * 128 + 128)
        if layout == "row":
            split = linear(w[:, part].contiguous(), w_group=group, x_group=group, k_index=torch.arange(K)[part])
            return split.run(x[:, part].contiguous(), dy)
        return linear(w, rows=part, x_group=group, dy_group=group, tokens=group).run(x[part], dy[part])

    whole = linear(w).run(x, dy)
    first, second = largest.ranks(run)
    join = {"row": (None, 1, 1), "tokens": (0, 0, None)}[layout]
    for name, expected, a, b, dim in zip(("y", "dx", "dw"), whole, first, second, join, strict=True):
        if dim is None:
            error = ((a.float() + b.float() - expected.float()).norm() / expected.float().norm()).item()
            assert error < (2e-6 if name == "dw" else 5e-3), f"{name}: sum of parts is off by {error}"
        else:
            close = torch.cat([a, b], dim).float() - expected.float()
            assert close.norm() <= 1e-3 * expected.float().norm(), f"{name}: parts are not slices of the whole"


@pytest.mark.parametrize("backend", [EmulatedBackend, SegmentedEmulatedBackend, ReferenceBackend])
def test_experts_take_the_mean_of_a_segment(backend: type[Backend]) -> None:
    """Zeros that extend a segment are no tokens: they would move the mean, and become its negative."""
    precision = centering(nvfp4_paper())
    case = routed(COUNTS["an empty expert and one token"])
    experts = Experts(precision, CentredBackend(backend()))
    for name, ours, theirs in zip(("y", "dx", "dw"), experts.run(*case), experts.looped(*case), strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=1e-5), name


def test_what_waits_for_the_backward_pass_is_x() -> None:
    """Not a second tensor of its size: x, its amax and the mean."""
    x, w, _ = tensors()
    linear, saved = Linear(w, centering(nvfp4_paper())), []
    linear.backend = CentredBackend(EmulatedBackend())  # type: ignore[assignment]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(x.requires_grad_())
    assert [tuple(t.shape) for t in saved] == [(T, K), (), (K,)]
    assert saved[0].data_ptr() == x.data_ptr()


def test_a_backend_that_nobody_wraps_does_not_ignore_it() -> None:
    assert isinstance(make_backend(PrecisionConfig(recipes={"r": centering(nvfp4_paper())})), CentredBackend)
    assert not isinstance(make_backend(PrecisionConfig(recipes={"r": nvfp4_paper()})), CentredBackend)
    x, w, dy = tensors()
    with pytest.raises(AssertionError, match="taken off by backends"):
        Linear(w, centering(nvfp4_paper())).run(x, dy)
