"""The linear of experts: bit for bit a loop of `quantized_linear`, whatever comes to which expert."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import (
    AmaxScope,
    Dgrad,
    EmulatedBackend,
    Format,
    FourOverSix,
    Fprop,
    LinearPrecision,
    NonFiniteError,
    Operand,
    Rounding,
    Sharding,
    Signs,
    StepClock,
    WeightCache,
    Wgrad,
    WgradOutput,
    WgradQueue,
    nvfp4_paper,
    quantized_linear,
)
from megatron_fp4.precision.backends import Backend, NonFiniteWatch
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.grouped import GroupedWeightCache, RowSegment, Segments, grouped_linear
from megatron_fp4.precision.grouped.emulated import SegmentedEmulatedBackend
from megatron_fp4.precision.recipes import uniform

E, N, K, FIRST = 4, 32, 48, 8
SINGLE = Group.single()
FP8 = LinearPrecision(
    Fprop(Operand(Format.fp8_block), Operand(Format.fp8_block, tile=(128, 128))),
    Dgrad(Operand(Format.fp8_block), Operand(Format.fp8_block, tile=(128, 128))),
    Wgrad(Operand(Format.fp8_block), Operand(Format.fp8_block)),
)


def drawn(name: str, rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return normal(key_of(name), torch.arange(rows), torch.arange(columns)).to(dtype)


class Experts:
    """E experts with what a layer would hold, as one grouped linear and as E single ones."""

    def __init__(
        self,
        precision: LinearPrecision,
        backend: Backend | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        size: tuple[int, int] = (N, K),
    ) -> None:
        self.size = size
        self.precision, self.clock = precision, StepClock(seed=3, step=5)
        self.backend = backend or SegmentedEmulatedBackend()
        self.weight = LogicalParameter.whole("w", drawn("w", E * size[0], size[1], dtype))
        self.cache = GroupedWeightCache(E, FIRST)
        self.queue: WgradQueue | None = None
        self.ready = 0
        self.shared = self.sharding()

    def sharding(self, expert: int | None = None) -> Sharding:
        return Sharding("experts.up", SINGLE, SINGLE, SINGLE, *map(torch.arange, self.size), expert)

    def grouped(self, x: Tensor, rows: Tensor, segments: Segments) -> Tensor:
        return grouped_linear(
            x,
            self.weight,
            rows=rows,
            segments=segments,
            sharding=self.shared,
            precision=self.precision,
            backend=self.backend,
            clock=self.clock,
            cache=self.cache,
            queue=self.queue,
        )

    def run(self, x: Tensor, dy: Tensor, rows: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and the FP32 dw of one pass."""
        self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)

        def ready() -> None:
            self.ready += 1

        self.weight.grad_ready = ready
        x = x.clone().requires_grad_()
        y = self.grouped(x, rows, segments)
        y.backward(dy)
        assert x.grad is not None
        return y.detach(), x.grad, self.weight.main_grad

    def looped(self, x: Tensor, dy: Tensor, rows: Tensor, segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one `quantized_linear` per segment."""
        size = self.size[0]
        y, dx, dw = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros(self.weight.shape)
        pads = {gemm.name: gemm.quantized for gemm in self.precision.gemms}
        precision = LinearPrecision(
            Fprop(self.precision.fprop.x, self.precision.fprop.w, pad=pads["fprop"]),
            Dgrad(self.precision.dgrad.dy, self.precision.dgrad.w, pad=pads["dgrad"]),
            Wgrad(self.precision.wgrad.dy, self.precision.wgrad.x, pad=pads["wgrad"]),
            self.precision.wgrad_output,
        )
        for part in segments.parts:
            own = slice(part.expert * size, (part.expert + 1) * size)
            weight = LogicalParameter.whole("w", self.weight.detach()[own].clone())
            weight.main_grad = dw[own]
            x_part = x[part.rows].clone().requires_grad_()
            y_part = quantized_linear(
                x_part,
                weight,
                rows=rows[part.rows],
                sharding=self.sharding(FIRST + part.expert),
                precision=precision,
                backend=self.backend,
                clock=self.clock,
                cache=WeightCache(),
            )
            y_part.backward(dy[part.rows])
            assert x_part.grad is not None
            y[part.rows], dx[part.rows] = y_part.detach(), x_part.grad
        return y, dx, dw


COUNTS = {
    "an empty expert and one token": [[5, 16], [0, 0], [1, 0], [7, 3]],
    "all to one": [[0, 0], [0, 0], [40, 8], [0, 0]],
    "multiples of the tile": [[16], [128], [32], [16]],
    "none": [[0], [0], [0], [0]],
}


def routed(
    counts: list[list[int]], dtype: torch.dtype = torch.bfloat16, size: tuple[int, int] = (N, K)
) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """x, dy, addresses and segments."""
    segments = Segments.of_counts(counts)
    rows = torch.arange(segments.num_rows) * 3 + 7
    n, k = size
    return drawn("x", len(rows), k, dtype), drawn("dy", len(rows), n, dtype), rows, segments


BACKENDS = {"a loop": EmulatedBackend, "one pass": SegmentedEmulatedBackend}
"""The operands of all segments one after the other, and at once."""


def check_equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for name, ours, theirs in zip(("y", "dx", "dw"), one, other, strict=True):
        assert torch.equal(ours, theirs), f"{name}: {(ours != theirs).sum()} of {ours.numel()} elements differ"


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["bf16", "nvfp4"])
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_grouped_equals_a_loop(
    backend: type[EmulatedBackend], name: str, counts: list[list[int]], dtype: torch.dtype
) -> None:
    """A scale over two segments, noise without the expert, or a row of the neighbour would differ."""
    precision = nvfp4_paper() if name == "nvfp4" else LinearPrecision()
    experts = Experts(precision, backend(), dtype=dtype)
    case = routed(counts, dtype)
    check_equal(experts.run(*case), experts.looped(*case))
    assert experts.ready == 1


FORMATS = {
    "mxfp4": uniform(Operand(Format.mxfp4, rounding=Rounding.sr)),
    "row scales": LinearPrecision(Fprop(Operand(Format.nvfp4, amax_scope=AmaxScope.row), Operand(Format.nvfp4))),
    "row scales of all": uniform(Operand(Format.nvfp4, amax_scope=AmaxScope.row)),
    "4/6": uniform(Operand(Format.nvfp4, four_over_six=FourOverSix.mse)),
    "4/6 square": nvfp4_paper(stochastic=False, rht=False).with_operands(
        lambda one: replace(one, four_over_six=FourOverSix.mae)
    ),
    "headroom, wgrad in bf16": replace(
        nvfp4_paper().with_operands(lambda one: replace(one, rounding=Rounding.sr_headroom)),
        wgrad=Wgrad(),
        wgrad_output=WgradOutput.compute,
    ),
    "ms_eden": uniform(Operand(Format.nvfp4, rounding=Rounding.ms_eden, rht_size=32, rht_signs=Signs.per_index)),
    "scales of 128": LinearPrecision(wgrad=Wgrad(*[Operand(Format.nvfp4, amax_scope=AmaxScope.group128)] * 2)),
    "ms_eden of dy alone": LinearPrecision(
        dgrad=Dgrad(
            Operand(Format.nvfp4, rounding=Rounding.ms_eden, rht_size=16, rht_signs=Signs.per_index),
            Operand(rht_size=16, rht_signs=Signs.per_index),
        ),
    ),
    "signs per step": replace(
        nvfp4_paper(), wgrad=nvfp4_paper().wgrad.with_operands(lambda one: replace(one, rht_signs=Signs.per_step))
    ),
}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
@pytest.mark.parametrize("precision", FORMATS.values(), ids=FORMATS.keys())
def test_every_format(precision: LinearPrecision, backend: type[EmulatedBackend]) -> None:
    """Sizes of 96: what is quantized in blocks of 32 needs no padding of N and K."""
    experts = Experts(precision, backend(), size=(96, 96))
    case = routed(COUNTS["an empty expert and one token"], size=(96, 96))
    check_equal(experts.run(*case), experts.looped(*case))


def test_padded_sizes() -> None:
    """fp8_block wants multiples of 128: all of T, N and K are extended, of each expert's weight by itself."""
    precision = FP8.with_operands(lambda one: one)
    padded = replace(
        precision,
        fprop=replace(precision.fprop, pad=True),
        dgrad=replace(precision.dgrad, pad=True),
        wgrad=replace(precision.wgrad, pad=True),
    )
    experts = Experts(padded)
    case = routed(COUNTS["an empty expert and one token"])
    check_equal(experts.run(*case), experts.looped(*case))


def test_reference_backend_is_the_oracle() -> None:
    """The emulated operands and those whose codes are really made: equal up to the one rounding of their sums."""
    case = routed(COUNTS["an empty expert and one token"])
    results = [
        Experts(nvfp4_paper(), backend).run(*case) for backend in (SegmentedEmulatedBackend(), ReferenceBackend())
    ]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("precision", [nvfp4_paper(), LinearPrecision()], ids=["nvfp4", "bf16"])
def test_rows_of_no_segment_are_nobodys(precision: LinearPrecision) -> None:
    """NaN in the gaps of a buffer of fixed capacity is neither an amax nor a gradient, and comes out as zero."""
    x, dy, rows, segments = routed([[5], [0], [20], [7]])
    expected = Experts(precision).run(x, dy, rows, segments)
    place, parts = [], []
    for part, start in zip(segments.parts, (0, 10, 40), strict=True):
        place += range(start, start + part.num_rows)
        parts.append(RowSegment(part.expert, start, start + part.num_rows))
    wide = Segments(tuple(parts), 64)

    def spread(tensor: Tensor, filling: float) -> Tensor:
        wider = torch.full((64, *tensor.shape[1:]), filling, dtype=tensor.dtype)
        wider[place] = tensor
        return wider

    y, dx, dw = Experts(precision).run(spread(x, torch.nan), spread(dy, torch.nan), spread(rows, 0).long(), wide)
    check_equal((y, dx, dw), (spread(expected[0], 0.0), spread(expected[1], 0.0), expected[2]))


def test_segments_do_not_feel_each_other() -> None:
    """A chunk of addresses computes the same alone, beside others, and however large they are."""
    x, dy, rows, segments = routed([[20, 13], [9, 0], [0, 30], [4, 4]])
    together = Experts(nvfp4_paper()).run(x * 1.0, dy, rows, segments)
    first = segments.parts[1]
    louder = x.clone()
    louder[: first.start] *= 1000
    for one, other in zip(together[:2], Experts(nvfp4_paper()).run(louder, dy, rows, segments)[:2], strict=True):
        assert torch.equal(one[first.start :], other[first.start :])
    alone = [Segments((RowSegment(part.expert, 0, part.num_rows),), part.num_rows) for part in segments.parts]
    experts = Experts(nvfp4_paper())
    parts = [
        experts.run(x[p.rows], dy[p.rows], rows[p.rows], one) for p, one in zip(segments.parts, alone, strict=True)
    ]
    assert torch.equal(together[0], torch.cat([y for y, _, _ in parts]))
    assert torch.equal(together[1], torch.cat([dx for _, dx, _ in parts]))
    torch.testing.assert_close(together[2], torch.stack([dw for _, _, dw in parts]).sum(0), rtol=0, atol=1e-4)


def test_two_experts_draw_different_noise_for_one_token() -> None:
    precision = LinearPrecision(Fprop(Operand(Format.nvfp4, rounding=Rounding.sr), Operand(Format.nvfp4)))
    experts = Experts(precision)
    with torch.no_grad():
        experts.weight[N : 2 * N] = experts.weight[:N]
    x = drawn("x", 16, K).repeat(2, 1)
    rows = torch.arange(16).repeat(2)
    y, _, _ = experts.run(x, torch.zeros(32, N, dtype=x.dtype), rows, Segments.of_counts([[16], [16], [0], [0]]))
    assert not torch.equal(y[:16], y[16:])


def test_recomputed_and_deferred_are_the_same() -> None:
    """Under recomputation the second forward pass draws the same noise; a queue changes when, not what."""
    x, dy, rows, segments = routed(COUNTS["an empty expert and one token"])
    expected = Experts(nvfp4_paper()).run(x, dy, rows, segments)
    experts = Experts(nvfp4_paper())
    experts.queue = WgradQueue()
    experts.weight.main_grad = torch.zeros_like(experts.weight, dtype=torch.float32)
    calls: list[str] = []
    experts.weight.grad_ready = lambda: calls.append("ready")
    x = x.clone().requires_grad_()
    y = checkpoint(experts.grouped, x, rows, segments, use_reentrant=False)
    y.backward(dy)
    assert not calls
    assert not experts.weight.main_grad.any()
    experts.queue.drain()
    assert calls == ["ready"]
    assert x.grad is not None
    check_equal((y.detach(), x.grad, experts.weight.main_grad), expected)


def test_without_an_optimizer_the_gradient_is_autograds() -> None:
    x, dy, rows, segments = routed(COUNTS["an empty expert and one token"])
    *_, expected = Experts(nvfp4_paper()).run(x, dy, rows, segments)
    experts = Experts(nvfp4_paper())
    experts.grouped(x, rows, segments).backward(dy)
    assert experts.weight.grad is not None
    assert torch.equal(experts.weight.grad, expected.to(torch.bfloat16))


def test_weights_are_quantized_once_and_anew_after_an_update() -> None:
    experts = Experts(nvfp4_paper())
    case = routed(COUNTS["multiples of the tile"])
    before, *_ = experts.run(*case)
    kept = next(iter(experts.cache._operands.values()))
    experts.run(*case)
    assert next(iter(experts.cache._operands.values())) is kept
    experts.weight.data.mul_(2)
    experts.clock.weights_version += 1
    assert not torch.equal(experts.run(*case)[0], before)
    check_equal(experts.run(*case), experts.looped(*case))


def test_a_main_gradient_in_bf16_is_rounded_once_however_many_segments_an_expert_has() -> None:
    """Each rank that sends tokens to an expert is a segment: 64 of them would be 64 roundings."""
    x, dy, rows, segments = routed([[2] * 64, [1] * 64, [0] * 64, [64] + [0] * 63])
    experts = Experts(LinearPrecision())
    *_, exact = experts.run(x, dy, rows, segments)
    experts.weight.main_grad = drawn("so far", E * N, K)
    expected = (experts.weight.main_grad.float() + exact).bfloat16()
    experts.grouped(x.requires_grad_(), rows, segments).backward(dy)
    assert torch.equal(experts.weight.main_grad, expected)


def test_proof_mode_sums_in_fp64() -> None:
    """FP32 operands given as FP64: the gradients are those of FP64 to the last bits."""
    x, dy, rows, segments = routed(COUNTS["an empty expert and one token"], torch.float32)
    experts = Experts(LinearPrecision(), dtype=torch.float32)
    experts.weight.main_grad = torch.zeros_like(experts.weight, dtype=torch.float64)
    wide = x.double().requires_grad_()
    y = experts.grouped(wide, rows, segments)
    y.backward(dy.double())
    chosen = experts.weight.detach().double().view(E, N, K)[segments.experts(x.device)]
    torch.testing.assert_close(y, torch.einsum("rk,rnk->rn", x.double(), chosen), rtol=1e-12, atol=1e-12)
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad, torch.einsum("rn,rnk->rk", dy.double(), chosen), rtol=1e-12, atol=1e-12)
    dw = torch.zeros(E, N, K, dtype=torch.float64)
    dw.index_add_(0, segments.experts(x.device), torch.einsum("rn,rk->rnk", dy.double(), x.double()))
    torch.testing.assert_close(experts.weight.main_grad, dw.view(E * N, K), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operand", ["x", "dy"])
def test_nonfinite_values_name_the_expert(operand: str) -> None:
    x, dy, rows, segments = routed([[5], [9], [0], [7]])
    {"x": x, "dy": dy}[operand][6, 3] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"experts.up, expert {FIRST + 1}: operand {operand} contains NaN"):
        Experts(nvfp4_paper()).run(x, dy, rows, segments)
    for backend in BACKENDS.values():
        watch = NonFiniteWatch()
        Experts(nvfp4_paper(), backend(watch=watch)).run(x, dy, rows, segments)
        assert watch.spoil(torch.ones((), dtype=torch.float64)).isnan()
        events = [(event.name, event.operand) for event in watch.take()]
        assert (f"experts.up, expert {FIRST + 1}", operand) in events
        assert all(name.endswith(f"expert {FIRST + 1}") for name, _ in events)


def test_refusals() -> None:
    x, dy, rows, segments = routed([[5], [9], [0], [7]])
    with pytest.raises(ValueError, match="20 rows and 21 addresses for 21 in segments"):
        Experts(nvfp4_paper()).run(x[:20], dy, rows, segments)
    with pytest.raises(ValueError, match="out of order"):
        Segments((RowSegment(1, 0, 4), RowSegment(0, 4, 8)), 8)
    with pytest.raises(ValueError, match=r"expert 8: .* must be a multiple of 32"):
        Experts(uniform(Operand(Format.mxfp4))).run(x, dy, rows, segments)
