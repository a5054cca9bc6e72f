"""The Transformer Engine backend on a semantic double whose numbers are TE's own reference implementation."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
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
    ScaleOrder,
    Signs,
    Wgrad,
    nvfp4_paper,
    uniform,
)
from megatron_fp4.precision.backends import Copy, NonFiniteWatch, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.config import ComputeDtype, PrecisionConfig
from megatron_fp4.precision.ledger import GemmLedger
from megatron_fp4.precision.operand import AmaxRounding
from megatron_fp4.precision.selftest.parts import first_mismatch, reference_parts, te_parts
from megatron_fp4.precision.te.api import FAST_MATH
from megatron_fp4.precision.te.refusals import check_capability
from megatron_fp4.precision.te.versions import Features
from tests.precision.grouped.test_grouped_linear import Experts, routed
from tests.precision.te import te_double
from tests.precision.te.te_wheels import SYMBOLS_OF_DOUBLE, find, parameters

T, N, K = 64, 96, 128
RNE = nvfp4_paper(stochastic=False)


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> TransformerEngineBackend:
    te_double.install(monkeypatch)
    return TransformerEngineBackend(config(RNE))


def config(*recipes: LinearPrecision, **settings: Any) -> PrecisionConfig:
    return PrecisionConfig(recipes={f"r{i}": recipe for i, recipe in enumerate(recipes)}, **settings)


def tensor(name: str, *shape: int) -> Tensor:
    return normal(key_of(name), *(torch.arange(size) for size in shape)).to(torch.bfloat16)


def origin(x: Tensor, operand: str = "x") -> OperandOrigin:
    rows, cols = (torch.arange(size) for size in x.shape)
    return OperandOrigin("blocks.0.mlp.up", operand, rows, cols, Group.single(), 1, 0)


def copies(precision: LinearPrecision) -> dict[str, tuple[Copy, Copy]]:
    """What linear_op asks of each tensor."""
    return {
        "x": (Copy("fprop", precision.fprop.x, 1), Copy("wgrad", precision.wgrad.x, 0, deferred=True)),
        "w": (Copy("fprop", precision.fprop.w, 1), Copy("dgrad", precision.dgrad.w, 0)),
        "dy": (Copy("dgrad", precision.dgrad.dy, 1), Copy("wgrad", precision.wgrad.dy, 0, deferred=True)),
    }


def prepare(backend: Any, precision: LinearPrecision = RNE) -> dict[str, tuple[QuantizedOperand, ...]]:
    shapes = {"x": (T, K), "w": (N, K), "dy": (T, N)}
    wanted = copies(precision)
    return {n: backend.quantize(t, origin(t, n), wanted[n]) for n, t in ((n, tensor(n, *s)) for n, s in shapes.items())}


def test_the_double_has_the_signatures_of_the_real_one() -> None:
    for name, module in SYMBOLS_OF_DOUBLE.items():
        node = find(te_double.VERSION, module, name)
        assert node is not None
        accepted = list(inspect.signature(getattr(te_double, name)).parameters)
        assert accepted == list(parameters(node)), f"{name}: the double accepts what Transformer Engine does not"


@pytest.mark.parametrize(
    "precision",
    [
        RNE,
        nvfp4_paper(stochastic=False, rht=False),
        nvfp4_paper(stochastic=False, square_weights=False),
        replace(RNE, wgrad=Wgrad(*[Operand(Format.nvfp4, rht_size=16, rht_signs=Signs.none)] * 2)),
    ],
    ids=["paper", "no_rht", "1d_weights", "no_signs"],
)
def test_operands_equal_the_reference_backend(monkeypatch: pytest.MonkeyPatch, precision: LinearPrecision) -> None:
    te_double.install(monkeypatch)
    theirs = prepare(TransformerEngineBackend(config(precision)), precision)
    ours = prepare(ReferenceBackend(), precision)
    for name, wanted in copies(precision).items():
        for copy, a, b in zip(wanted, theirs[name], ours[name], strict=True):
            mismatch = first_mismatch(te_parts(a, copy), reference_parts(b), copy)
            assert mismatch is None, f"{copy.gemm}.{name} is not the operand that is emulated: {mismatch}"


def test_four_over_six_equals_the_reference_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    operand = Operand(Format.nvfp4, four_over_six=FourOverSix.mse)
    precision = uniform(operand)
    theirs, ours = (
        prepare(TransformerEngineBackend(config(precision)), precision),
        prepare(ReferenceBackend(), precision),
    )
    copy = copies(precision)["w"][0]
    mismatch = first_mismatch(te_parts(theirs["w"][0], copy), reference_parts(ours["w"][0]), copy)
    assert mismatch is None, f"bound or error measure is not handed over: {mismatch}"


def test_products_are_those_of_the_emulation(te: TransformerEngineBackend) -> None:
    theirs, ours, emulated = prepare(te), prepare(EmulatedBackend()), EmulatedBackend()
    pairs = {"fprop": (("x", 0), ("w", 0)), "dgrad": (("dy", 0), ("w", 1)), "wgrad": (("dy", 1), ("x", 1))}
    for gemm, ((a, i), (b, j)) in pairs.items():
        product = te.matmul(theirs[a][i], theirs[b][j], out_dtype=torch.float32)
        want = emulated.matmul(ours[a][i], ours[b][j], out_dtype=torch.float32)
        assert product.shape == want.shape, f"{gemm}: the GEMM layout is wrong"
        torch.testing.assert_close(product, want, rtol=1e-5, atol=1e-5 * want.abs().max().item(), msg=f"{gemm}: alpha")


def test_wgrad_accumulates_inside_the_gemm(te: TransformerEngineBackend) -> None:
    operands = prepare(te)
    once = te.matmul(operands["dy"][1], operands["x"][1], out_dtype=torch.float32)
    total = torch.ones(N, K)
    result = te.matmul(operands["dy"][1], operands["x"][1], out_dtype=torch.float32, accumulate_into=total)
    assert result is total, "main_grad must be the output of the GEMM itself"
    assert torch.equal(total, once + 1)
    narrow = torch.ones(N, K)
    te.matmul(operands["dy"][1], operands["x"][1], out_dtype=torch.bfloat16, accumulate_into=narrow)
    assert torch.equal(narrow, once.bfloat16().float() + 1), "wgrad_output: compute rounds once, then adds in FP32"


def test_both_copies_come_from_one_call(te: TransformerEngineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, bool]] = []
    original = te_double.NVFP4Quantizer.__call__

    def counted(self: Any, x: Tensor) -> Any:
        calls.append((self.rowwise_usage, self.columnwise_usage))
        return original(self, x)

    monkeypatch.setattr(te_double.NVFP4Quantizer, "__call__", counted)
    prepare(te)
    prepare(te)
    assert calls == [(True, True)] * 6, "each tensor would be read twice"
    assert len(te._quantizers) == 2, "quantizers would be built again for every tensor"  # x and dy alike, w


def test_a_copy_keeps_only_its_own_direction(te: TransformerEngineBackend) -> None:
    row, column = prepare(te)["x"]
    assert row.stored()["data"].shape == (T, K // 2)
    assert column.stored()["data"].shape == (K, T // 2)
    kept = sum(t.numel() * t.element_size() for t in column.tensors)
    assert len(column.tensors) == 3, "the row-wise copy would be kept alive until the backward pass"
    assert kept < T * K, "BF16 x would be kept instead of codes"


def test_saved_tensors_can_be_put_back(te: TransformerEngineBackend) -> None:
    operands = prepare(te)
    column = operands["x"][1]
    restored = column.with_tensors(()).with_tensors([t.clone() for t in column.tensors])
    a = te.matmul(operands["dy"][1], column, out_dtype=torch.float32)
    assert torch.equal(a, te.matmul(operands["dy"][1], restored, out_dtype=torch.float32))


def test_directions_of_different_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's appendix D: forward BF16, backward NVFP4, without TE's Hybrid quantizers (trap 13)."""
    te_double.install(monkeypatch)
    precision = replace(RNE, fprop=Fprop())
    te = TransformerEngineBackend(config(precision))
    operands, ours = prepare(te, precision), prepare(EmulatedBackend(), precision)
    y = te.matmul(operands["x"][0], operands["w"][0], out_dtype=torch.bfloat16)
    assert torch.equal(y, EmulatedBackend().matmul(ours["x"][0], ours["w"][0], out_dtype=torch.bfloat16))
    te.matmul(operands["dy"][1], operands["x"][1], out_dtype=torch.float32)


def test_the_amax_group_is_that_of_the_source(te: TransformerEngineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[Any] = []
    original = te_double.NVFP4Quantizer.__call__

    def spied(self: Any, x: Tensor) -> Any:
        groups.append(self.amax_reduction_group if self.with_amax_reduction else None)
        self.with_amax_reduction, self.amax_reduction_group = False, None  # what 2.20 does after each call
        return original(self, x)

    monkeypatch.setattr(te_double.NVFP4Quantizer, "__call__", spied)
    x = tensor("x", T, K)
    tp, cp = (Group(name, (0, 1), 0, object()) for name in ("tp", "cp"))  # type: ignore[arg-type]
    alone = Operand(Format.nvfp4, amax_scope=AmaxScope.shard)
    for group in (tp, tp, cp, Group.single()):
        te.quantize(x, replace(origin(x), group=group), copies(RNE)["x"])
    te.quantize(x, replace(origin(x), group=tp), [Copy("fprop", alone, 1)])
    assert groups == [tp.process_group, tp.process_group, cp.process_group, None, None], "amax over the wrong ranks"


def test_mxfp8_copies_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    precision = uniform(Operand(Format.mxfp8))
    te = TransformerEngineBackend(config(precision))
    theirs, ours, emulated = prepare(te, precision), prepare(ReferenceBackend(), precision), EmulatedBackend()
    for name, wanted in copies(precision).items():
        for copy, a, b in zip(wanted, theirs[name], ours[name], strict=True):
            mismatch = first_mismatch(te_parts(a, copy), reference_parts(b), copy)
            assert mismatch is None, f"{copy.gemm}.{name}: column-wise MXFP8 is not transposed in TE: {mismatch}"
    dw = te.matmul(theirs["dy"][1], theirs["x"][1], out_dtype=torch.float32)
    operands = prepare(emulated, precision)
    want = emulated.matmul(operands["dy"][1], operands["x"][1], out_dtype=torch.float32)
    torch.testing.assert_close(dw, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_the_generator_is_seeded_once_per_step(te: TransformerEngineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def draws(step: int, rank: int) -> list[float]:
        group = Group("tp", (0, 1), rank, object())  # type: ignore[arg-type]
        at = replace(origin(tensor("x", T, K)), step=step, group=group)
        values = []
        for _ in range(2):
            te._seed(at, torch.device("cuda"))
            values.append(torch.rand((), generator=generator).item())
        return values

    first, second = draws(1, 0), draws(2, 0)
    assert first[0] != first[1], "every tensor of a step would get the same random bits"
    assert first != second, "every step would draw the same bits"
    assert draws(1, 0) == first, "a resumed run must draw the bits of the first one"
    te._seed(replace(origin(tensor("x", T, K)), step=9), torch.device("cuda"))
    assert draws(1, 1) != first, "two ranks would round their shards with the same bits"


def test_nan_and_inf(te: TransformerEngineBackend) -> None:
    for bad in (float("nan"), float("inf")):
        x = tensor("x", T, K)
        x[3, 5] = bad
        with pytest.raises(NonFiniteError, match=r"blocks\.0\.mlp\.up"):
            te.quantize(x, origin(x), copies(RNE)["x"])
    watch = NonFiniteWatch()
    x[3, 5] = float("nan")
    TransformerEngineBackend(config(RNE), watch).quantize(x, origin(x), copies(RNE)["x"])
    assert [event.operand for event in watch.take()] == ["x"], "the trainer would keep a step with NaN"


W = Operand(Format.nvfp4, tile=(16, 16))
X = Operand(Format.nvfp4)
RHT = Operand(Format.nvfp4, rht_size=16)


def fprop(x: Operand, w: Operand = W) -> LinearPrecision:
    return LinearPrecision(fprop=Fprop(x, w))


def wgrad(operand: Operand) -> LinearPrecision:
    return LinearPrecision(wgrad=Wgrad(operand, operand))


@pytest.mark.parametrize(
    ("precision", "printed"),
    [
        (fprop(Operand(Format.mxfp4), Operand(Format.mxfp4)), "mxfp4 has no quantizer"),
        (fprop(Operand(), W), "operands in bf16 and nvfp4"),
        (fprop(Operand(Format.mxfp8), W), "operands in mxfp8 and nvfp4"),
        (fprop(replace(X, rounding=Rounding.sr_headroom)), "sr_headroom"),
        (fprop(replace(X, rounding=Rounding.sr, noise_bits=20)), "noise_bits = 20"),
        (fprop(replace(X, scale_order=ScaleOrder.paper)), "set scale_order: te"),
        (fprop(replace(X, amax_scope=AmaxScope.row)), "amax_scope row"),
        (fprop(RHT, RHT), "wgrad only"),
        (wgrad(replace(RHT, rht_size=32)), "rht_size = 32"),
        (wgrad(replace(RHT, rht_signs=Signs.per_step)), "rht_signs per_step"),
        (wgrad(replace(RHT, tile=(16, 16))), "16x16 tiles"),
        (wgrad(replace(RHT, four_over_six=FourOverSix.mae)), "four_over_six with"),
        (fprop(replace(X, four_over_six=FourOverSix.mae, rounding=Rounding.sr)), "four_over_six with"),
        (fprop(*[Operand(Format.fp8_block, tile=(128, 128))] * 2), "128x128"),
        (
            LinearPrecision(dgrad=Dgrad(X, replace(W, four_over_six=FourOverSix.mae))),
            "column-wise copy alone",
        ),
    ],
)
def test_refused_up_front(monkeypatch: pytest.MonkeyPatch, precision: LinearPrecision, printed: str) -> None:
    te_double.install(monkeypatch)
    with pytest.raises(ValueError, match=printed) as caught:
        TransformerEngineBackend(config(precision))
    assert "version 2.20.2" in str(caught.value)
    assert "r0" in str(caught.value), "the recipe must be named"
    assert "backend=emulated" in str(caught.value), "the remedy must be named"


def test_old_version_wants_the_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch, "2.10.0", **te_double.BEFORE_2_19)
    with pytest.raises(ValueError, match="set scale_order: paper"):
        TransformerEngineBackend(config(RNE))


def test_the_version_of_the_image_computes_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hybrid and Identity quantizers came after it; the backend needs neither."""
    te_double.install(monkeypatch, "2.17.0", **te_double.BEFORE_2_19)
    te = TransformerEngineBackend(config(replace(RNE, fprop=Fprop())))
    assert te.api.features == Features(ScaleOrder.te, four_over_six=True, mixed_directions=False)


def test_what_was_renamed_is_refused_before_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """TypeError or AttributeError at the first GEMM, hours after the job was queued."""

    def renamed(A: Any, B: Any, output_dtype: Any = None, layout: str = "TN") -> Any:
        raise AssertionError("never called")

    te_double.install(monkeypatch, "2.21.0", general_gemm=renamed)
    with pytest.raises(ValueError, match=r"2\.21\.0 has no general_gemm as.*uses it"):
        TransformerEngineBackend(config(RNE))
    te_double.install(monkeypatch, "2.21.0", NVFP4Quantizer=None)
    with pytest.raises(ValueError, match=r"2\.21\.0 has no NVFP4Quantizer as"):
        TransformerEngineBackend(config(RNE))


def test_absent_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ValueError, match=r"cannot be imported.*install transformer-engine"):
        TransformerEngineBackend(config(RNE))
    te_double.install(monkeypatch, "2.9.0")
    with pytest.raises(ValueError, match=r"2\.9\.0 is older than 2\.10"):
        TransformerEngineBackend(config(RNE))


@pytest.mark.parametrize("name", FAST_MATH)
def test_kernels_set_to_round_differently(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    te_double.install(monkeypatch)
    monkeypatch.setenv(name, "0")
    TransformerEngineBackend(config(RNE))
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=rf"{name}=1 makes.*unset it"):
        TransformerEngineBackend(config(RNE))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class NeedsCuda(te_double.NVFP4Quantizer):
        def __init__(self, **settings: Any) -> None:
            raise AssertionError("Torch not compiled with CUDA enabled")

    te_double.install(monkeypatch, NVFP4Quantizer=NeedsCuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU.*backend=emulated"):
        prepare(TransformerEngineBackend(config(RNE)))


def test_compute_dtype_fp32_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    te_double.install(monkeypatch)
    with pytest.raises(ValueError, match="BF16 only"):
        TransformerEngineBackend(config(RNE, compute_dtype=ComputeDtype.fp32))


@pytest.mark.parametrize(("shape", "printed"), [((64, 48), "48, must be a multiple of 32"), ((40, 64), "40.*16")])
def test_shapes_that_kernels_refuse(te: TransformerEngineBackend, shape: tuple[int, int], printed: str) -> None:
    x = tensor("odd", *shape)
    wanted: Sequence[Copy] = [Copy("fprop", X, 1)]
    with pytest.raises(ValueError, match=printed):
        te.quantize(x, origin(x), wanted)


def test_nvfp4_availability_is_not_believed() -> None:
    check_capability((10, 3), {Format.nvfp4, Format.fp8_block})
    with pytest.raises(ValueError, match=r"this one has 12\.0"):
        check_capability((12, 0), {Format.nvfp4})
    with pytest.raises(ValueError, match=r"nvfp4.*this one has 9\.0"):
        check_capability((9, 0), {Format.fp8_block, Format.nvfp4})


def test_experts_on_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """GEMM by GEMM, segments extended to what its kernels take; operands are those of the emulation."""
    te_double.install(monkeypatch)
    counts, size = [[5, 40], [0, 0], [1, 0], [7, 3]], (96, 128)
    case = routed(counts, size=size)
    theirs, ours = (
        Experts(RNE, backend, size=size).run(*case)
        for backend in (GemmLedger(TransformerEngineBackend(config(RNE))), EmulatedBackend())
    )
    for name, one, other in zip(("y", "dx", "dw"), theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-2, msg=f"{name} differs from the emulation")
    rounded = RNE.with_operands(lambda one: replace(one, amax_rounding=AmaxRounding.power_of_two))
    with pytest.raises(ValueError, match=r"amax_rounding power_of_two, .*; use none"):
        TransformerEngineBackend(config(rounded))
