"""One scale for all that reaches an expert in a call, and scales that are powers of two: rules a and ap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.models.block import LinearInfo
from megatron_fp4.numerics.stages import power_of_two_amax
from megatron_fp4.precision import (
    AmaxScope,
    Dgrad,
    EmulatedBackend,
    Format,
    Fprop,
    LinearPrecision,
    Operand,
    Wgrad,
    nvfp4_paper,
)
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.config import PrecisionConfig, Rule
from megatron_fp4.precision.grouped import Segments
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend
from megatron_fp4.precision.operand import AmaxRounding
from megatron_fp4.precision.plan import PrecisionPlan
from tests.precision.grouped.test_grouped_linear import Experts, check_equal, routed


def by_call(precision: LinearPrecision) -> LinearPrecision:
    """x and dy over all rows that reach an expert."""

    def wide(operand: Operand) -> Operand:
        return replace(operand, amax_scope=AmaxScope.expert_call)

    fprop, dgrad, wgrad = precision.gemms
    return LinearPrecision(
        replace(fprop, x=wide(fprop.x)), replace(dgrad, dy=wide(dgrad.dy)), wgrad.with_operands(wide)
    )


@pytest.mark.parametrize("backend", [EmulatedBackend, SegmentedEmulatedBackend], ids=["a loop", "one pass"])
def test_the_segments_of_an_expert_are_one_tensor(backend: type[EmulatedBackend]) -> None:
    """Multiples of 16 from two sources compute what one segment of both computes; with the default they do not."""
    x, dy, rows, segments = routed([[16, 32], [0, 0], [48, 0], [16, 16]])
    x[:16] *= 8
    one = Segments.of_counts([[48], [0], [48], [32]])
    joined = Experts(by_call(nvfp4_paper()), backend()).run(x, dy, rows, segments)
    check_equal(joined, Experts(nvfp4_paper(), backend()).run(x, dy, rows, one))
    assert not torch.equal(joined[0], Experts(nvfp4_paper(), backend()).run(x, dy, rows, segments)[0])


def test_rows_come_back_to_their_places() -> None:
    """Segments that are extended inside of one tensor; each row's y is that of its own x."""
    x, dy, rows, segments = routed([[5, 7], [0, 0], [1, 3], [20, 2]])
    joined = Experts(by_call(nvfp4_paper(stochastic=False, rht=False))).run(x, dy, rows, segments)
    apart = Experts(nvfp4_paper(stochastic=False, rht=False)).run(x, dy, rows, segments)
    for one, other in zip(joined, apart, strict=True):
        assert (one.float() - other.float()).norm() < 0.15 * other.float().norm()


def test_powers_of_two_do_not_feel_the_amax() -> None:
    """A scale over 16 times larger neighbours gives the same codes, as a power of two; else other ones."""
    x, dy, rows, segments = routed([[16, 16], [0, 0], [0, 0], [0, 0]])
    x[16:] *= 16
    for rounding, equal in ((AmaxRounding.power_of_two, True), (AmaxRounding.none, False)):
        precision = nvfp4_paper(stochastic=False).with_operands(lambda one, r=rounding: replace(one, amax_rounding=r))
        joined = Experts(by_call(precision)).run(x, dy, rows, segments)[0]
        assert torch.equal(joined, Experts(precision).run(x, dy, rows, segments)[0]) is equal


@pytest.mark.parametrize("aim", [2688.0, 2496.0, 1536.0])
def test_rounded_amax(aim: float) -> None:
    amax = torch.cat([torch.rand(1000).exp2() * 2.0 ** torch.arange(-60, 60, 0.12), torch.tensor([aim, aim * 4])])
    rounded = power_of_two_amax(amax, aim)
    scale = torch.full_like(rounded, aim) / rounded
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert ((rounded >= amax) & (rounded < 2 * amax)).all()
    assert torch.equal(rounded[-2:], amax[-2:])
    special = torch.tensor([0.0, torch.inf, torch.nan])
    torch.testing.assert_close(power_of_two_amax(special, aim), special, rtol=0, atol=0, equal_nan=True)


def test_backends_round_the_amax_alike() -> None:
    precision = nvfp4_paper().with_operands(lambda one: replace(one, amax_rounding=AmaxRounding.power_of_two))
    x, dy, rows, segments = routed([[5, 7], [0, 0], [1, 3], [20, 2]])
    results = [
        Experts(precision, backend).run(x, dy, rows, segments)
        for backend in (SegmentedEmulatedBackend(), EmulatedBackend(), ReferenceBackend())
    ]
    check_equal(results[0], results[1])
    for one, other in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-5)


def test_refused_where_it_means_nothing() -> None:
    wide, default = Operand(Format.nvfp4, amax_scope=AmaxScope.expert_call), Operand(Format.nvfp4)
    for gemm in (Fprop, Dgrad):
        with pytest.raises(ValueError, match="expert_call of a weight, whose scale is one per expert already"):
            gemm(wide, wide)
    with pytest.raises(ValueError, match="joins the segments of both operands; give it to both"):
        Wgrad(wide, default)
    with pytest.raises(ValueError, match=r"amax_rounding need\(s\) the two-level scales of nvfp4"):
        Operand(Format.mxfp8, amax_rounding=AmaxRounding.power_of_two)
    linears = [
        LinearInfo("blocks.0.moe.experts.up", 0, 64, {"": 64}, True, True, 8, 2),
        LinearInfo("blocks.1.mlp.up", 1, 64, {"": 64}, True),
    ]
    config = PrecisionConfig(recipes={"r": by_call(nvfp4_paper())}, rules=[Rule("*.experts.*", use="r"), Rule("*")])
    plan = PrecisionPlan(config, linears)
    assert plan.table()["blocks.0.moe.experts.up"] == by_call(nvfp4_paper())
    plan.check_shapes(linears, tp=1, tokens=40)
    with pytest.raises(ValueError, match=r"blocks.1.mlp.up has amax_scope=expert_call, but no experts"):
        PrecisionPlan(replace(config, rules=[Rule("*", use="r")]), linears)
