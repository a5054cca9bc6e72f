"""The emulated backend against the reference backend: equal operands, bit for bit, and exact products."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.planning.footprint import LiveBytes
from megatron_fp4.precision import (
    AmaxScope,
    EmulatedBackend,
    Format,
    FourOverSix,
    NonFiniteError,
    Operand,
    Rounding,
    ScaleOrder,
    Signs,
)
from megatron_fp4.precision.backends import Copy, OperandOrigin, QuantizedOperand, copies_of, finite, product
from megatron_fp4.precision.backends.product import Factors, GlobalScale, multiply_on_cuda, scaled_matmul
from megatron_fp4.precision.backends.reference import ReferenceBackend, decode
from megatron_fp4.precision.operand import AmaxRounding
from megatron_fp4.precision.recipes import RECIPES

N4 = Format.nvfp4
OPERANDS = [
    Operand(),
    Operand(N4),
    Operand(N4, tile=(16, 16)),
    Operand(N4, scale_order=ScaleOrder.paper),
    Operand(N4, rounding=Rounding.sr),
    Operand(N4, rounding=Rounding.sr, noise_bits=20),
    Operand(N4, rounding=Rounding.sr_headroom),
    Operand(N4, tile=(16, 16), rounding=Rounding.sr),
    Operand(N4, amax_scope=AmaxScope.shard),
    Operand(N4, amax_scope=AmaxScope.row),
    Operand(N4, amax_scope=AmaxScope.group128, rht_size=16, rounding=Rounding.sr),
    Operand(N4, amax_scope=AmaxScope.group128, four_over_six=FourOverSix.mse),
    Operand(
        N4,
        amax_scope=AmaxScope.group128,
        rounding=Rounding.ms_eden,
        rht_size=128,
        rht_signs=Signs.per_index,
        amax_rounding=AmaxRounding.power_of_two,
    ),
    Operand(N4, four_over_six=FourOverSix.mae),
    Operand(N4, four_over_six=FourOverSix.mse, four_over_six_bound=448, tile=(16, 16)),
    Operand(N4, four_over_six=FourOverSix.mae, rht_size=16, rounding=Rounding.sr),
    *(Operand(N4, rht_size=size) for size in (4, 16, 32, 64, 128)),
    Operand(N4, rht_size=16, rht_signs=Signs.none),
    Operand(N4, rht_size=16, rht_signs=Signs.per_step, rounding=Rounding.sr),
    Operand(N4, rounding=Rounding.ms_eden, rht_size=128, rht_signs=Signs.per_index),
    Operand(N4, rounding=Rounding.ms_eden, rht_size=16, rht_signs=Signs.per_step, scale_order=ScaleOrder.paper),
    Operand(N4, rounding=Rounding.ms_eden, rht_size=64, rht_signs=Signs.per_index, four_over_six=FourOverSix.mse),
    Operand(N4, tile=(16, 16), rht_size=32, rht_signs=Signs.per_index),
    Operand(rht_size=128, rht_signs=Signs.per_index),
    Operand(Format.mxfp4),
    Operand(Format.mxfp4, rounding=Rounding.sr, rht_size=32),
    Operand(Format.mxfp8),
    Operand(Format.fp8_block),
    Operand(Format.fp8_block, tile=(128, 128)),
]


WITHOUT_BF16 = pytest.mark.skipif(not product.cpu_multiplies_bf16(), reason="this CPU has no BF16 instructions")
NATIVE = [pytest.param(True, marks=WITHOUT_BF16, id="BF16 GEMM"), pytest.param(False, id="widened")]


def origin(x: Tensor, step: int = 3) -> OperandOrigin:
    rows, cols = torch.arange(x.shape[0]) + 64, torch.arange(x.shape[1]) + 32
    return OperandOrigin("blocks.0.mlp.up", "dy", rows, cols, Group.single(), seed=1, step=step)


def values(prepared: QuantizedOperand, backend: EmulatedBackend) -> Tensor:
    """The operand without its global scale: multiplied by the identity."""
    operand, _ = backend._operand(prepared, prepared.tensors[0].dtype)
    return operand


@pytest.fixture(scope="module")
def x() -> Tensor:
    gen = torch.Generator().manual_seed(0)
    gauss = torch.randn(128, 256, generator=gen)
    return gauss / torch.randn(128, 256, generator=gen).abs().clamp(min=0.01)


@pytest.mark.parametrize("operand", OPERANDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("deferred", [False, True])
def test_operands_equal_the_reference(operand: Operand, dtype: torch.dtype, deferred: bool, x: Tensor) -> None:
    """A difference: fused arithmetic, noise addressing, orientation or deferral changed an operand."""
    emulated, reference = EmulatedBackend(), ReferenceBackend()
    x = x.to(dtype)
    for along in (0, 1):
        copy = Copy("wgrad", operand, along, deferred)
        (ours,), (theirs,) = (backend.quantize(x, origin(x), [copy]) for backend in (emulated, reference))
        expected, scale = decode(theirs)
        assert torch.equal(values(ours, emulated).float(), expected.float()), f"along {along}"
        _, our_scale = emulated._operand(ours, dtype)
        assert (scale is None) == (our_scale is None)
        if scale is not None and our_scale is not None:
            assert torch.equal(scale[0].flatten(), our_scale[0].flatten()), "global amax"
            assert scale[1] == our_scale[1]


@pytest.mark.parametrize(("recipe", "collectives"), [("nvfp4", 3), ("mxfp4", 0), ("mxfp8", 0), ("fp8", 0)])
def test_formats_without_a_global_scale_share_no_amax(
    recipe: str, collectives: int, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One collective for each of x, w and dy in nvfp4; elsewhere NaN and Inf are seen without."""
    groups = []
    monkeypatch.setattr(finite, "all_reduce_max", lambda amaxes, group: groups.append(group) or amaxes)
    place = replace(origin(x), group=Group("both", (0, 1), 0, object()))
    for backend in (EmulatedBackend(), ReferenceBackend()):
        groups.clear()
        for copies in copies_of(RECIPES[recipe]).values():
            backend.quantize(x, place, copies)
        assert len(groups) == collectives
        with pytest.raises(NonFiniteError):
            backend.quantize(torch.full_like(x, float("nan")), place, copies_of(RECIPES[recipe])["x"])


@pytest.mark.parametrize(
    "operand", [Operand(N4, tile=(16, 16)), Operand(N4), Operand(Format.mxfp8), Operand()], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matmul_close_to_the_reference(operand: Operand, dtype: torch.dtype, x: Tensor) -> None:
    """The two differ by the order of an FP32 sum only; more means that alpha or an orientation is wrong."""
    results = []
    for backend in (EmulatedBackend(), ReferenceBackend()):
        a = backend.quantize(x.to(dtype), origin(x), [Copy("fprop", operand, 1)])[0]
        b = backend.quantize(x.to(dtype).T.contiguous(), origin(x.T), [Copy("fprop", operand, 0)])[0]
        total = torch.ones(128, 128)
        results.append(backend.matmul(a, b, out_dtype=dtype).float())
        results.append(backend.matmul(a, b, out_dtype=torch.float32, accumulate_into=total) - 1.0)
    assert (results[0] - results[2]).norm() <= 3e-3 * results[2].norm()
    assert (results[1] - results[3]).norm() <= 1e-5 * results[3].norm()


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("native", NATIVE)
def test_alpha_is_applied_before_the_only_rounding(
    out_dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integer operands make the FP32 sum exact, so the result must be the FP64 product rounded once, everywhere."""
    monkeypatch.setattr(product, "cpu_multiplies_bf16", lambda: native)
    gen = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-12, 13, (256, 512), generator=gen).bfloat16() for _ in range(2))
    amax_a, amax_b = torch.tensor(3.1415927), torch.tensor(0.2718282)
    scales = {"a_scale": GlobalScale(amax_a, 2688.0), "b_scale": GlobalScale(amax_b, 2688.0)}
    got = scaled_matmul(a, b, **scales, out_dtype=out_dtype)
    alpha = (amax_a * amax_b) / torch.tensor(2688.0**2)
    expected = ((a.double() @ b.double().T) * alpha.double()).to(out_dtype)
    wrong = (got != expected).sum().item()
    assert wrong == 0, f"{wrong} of {got.numel()} elements are not the correctly rounded product"
    assert got.dtype == out_dtype


@pytest.mark.parametrize("native", [True, False])
def test_bf16_results_come_from_the_gemm_that_the_cpu_is_good_at(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without BF16 instructions torch's BF16 GEMM is several times slower; the operands are as exact in FP32."""
    monkeypatch.setattr(product, "cpu_multiplies_bf16", lambda: native)
    seen: list[torch.dtype] = []
    plain = {name: getattr(torch, name) for name in ("mm", "addmm")}
    for name, call in plain.items():
        monkeypatch.setattr(
            torch, name, lambda *args, call=call, **kw: seen.append(args[-1].dtype) or call(*args, **kw)
        )
    a = torch.ones(16, 16, dtype=torch.bfloat16)
    assert scaled_matmul(a, a, out_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert seen == [torch.bfloat16 if native else torch.float32]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_gpu_makes_no_wider_product_than_it_must(scaled: bool) -> None:
    """Without a scale the GEMM writes BF16, and adds a weight gradient to its sum; both took FP32 beside that."""
    a, b = (torch.empty(size, 512, dtype=torch.bfloat16, device="meta") for size in (256, 128))
    total = torch.empty(256, 128, device="meta")
    factors = Factors(torch.empty((), device="meta") if scaled else None, None, None)
    peaks = []
    for out_dtype, into in ((torch.bfloat16, None), (torch.float32, total)):
        with LiveBytes() as live:
            out = multiply_on_cuda(a, b, factors, out_dtype, into)
        assert out.dtype == out_dtype
        assert into is None or out is into
        peaks.append(live.peak)
    assert peaks == ([256 * 128 * 6, 256 * 128 * 4] if scaled else [256 * 128 * 2, 0])


@pytest.mark.parametrize("adds", [True, False], ids=["", "a torch whose GEMM does not add"])
@pytest.mark.parametrize("factors", ["none", "alpha", "rows"])
def test_a_gpus_products_are_the_formulas(factors: str, adds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact GEMMs stand in for its own. Sums of integers are exact, so that each path must give the same bits."""
    gen = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-12, 13, (size, 512), generator=gen).bfloat16() for size in (32, 16))
    alpha, rows = torch.tensor(0.0127), torch.linspace(0.1, 0.3, 32).view(-1, 1)
    scale = Factors(alpha if factors != "none" else None, rows if factors == "rows" else None, None)
    called: list[str] = []

    def mm(x: Tensor, y: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        called.append(f"mm to {out_dtype or x.dtype}")
        return (x.double() @ y.double()).to(out_dtype or x.dtype)

    def addmm(start: Tensor, x: Tensor, y: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
        called.append("addmm")
        return out.copy_(start + mm(x, y, out_dtype))

    monkeypatch.setattr(product, "adds_bf16_products", lambda: adds)
    for out_dtype in (torch.bfloat16, torch.float32, torch.float64):
        for into in (None, torch.linspace(-3, 3, 512).view(32, 16)):
            expected = product.multiply_widened(a, b, scale, out_dtype, None if into is None else into.clone())
            with monkeypatch.context() as patch:
                patch.setattr(torch, "mm", mm)
                patch.setattr(torch.ops.aten.addmm, "dtype_out", addmm, raising=False)
                ours = multiply_on_cuda(a, b, scale, out_dtype, into)
            assert ours.dtype == expected.dtype
            assert torch.equal(ours, expected), f"{out_dtype}, into: {into is not None}"
            assert into is None or ours is into
    assert ("addmm" in called) == (adds and factors == "none")
    assert ("mm to torch.bfloat16" in called) == (factors == "none")


def test_row_scales_equal_the_reference(x: Tensor) -> None:
    """With one global scale per row, a wrong broadcast would scale columns instead of rows."""
    operand = Operand(N4, amax_scope=AmaxScope.row)
    products = []
    for backend in (EmulatedBackend(), ReferenceBackend()):
        a = backend.quantize(x.bfloat16(), origin(x), [Copy("fprop", operand, 1)])[0]
        b = backend.quantize(x[:64].bfloat16(), origin(x[:64]), [Copy("fprop", operand, 1)])[0]
        products.append(backend.matmul(a, b, out_dtype=torch.float32))
    assert (products[0] - products[1]).norm() <= 1e-5 * products[1].norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", [EmulatedBackend(), ReferenceBackend()], ids=["emulated", "reference"])
def test_bad_numbers_are_named(bad: float, dtype: torch.dtype, backend: EmulatedBackend, x: Tensor) -> None:
    """If one passes, it becomes an ordinary FP4 code and the error disappears."""
    x = x.to(dtype).clone()
    x[17, 33] = bad
    with pytest.raises(NonFiniteError, match=r"blocks.0.mlp.up: operand dy .* step 3 on rank 0") as caught:
        backend.quantize(x, origin(x), [Copy("dgrad", Operand(N4), 1)])
    assert (caught.value.name, caught.value.operand) == ("blocks.0.mlp.up", "dy")


def test_shapes_that_do_not_fit_are_refused_with_the_numbers(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"wgrad has local shape \(120, 256\).*120 must be a multiple of 16"):
        EmulatedBackend().quantize(x[:120], origin(x[:120]), [Copy("wgrad", Operand(N4), 0)])
    with pytest.raises(ValueError, match="multiple of 128"):
        EmulatedBackend().quantize(x[:64], origin(x[:64]), [Copy("wgrad", Operand(N4, rht_size=128), 0)])


def test_square_weights_are_quantized_once(x: Tensor) -> None:
    """Fprop and Dgrad share one tensor: two would double the memory of the weight cache."""
    operand = Operand(N4, tile=(16, 16))
    copies = [Copy("fprop", operand, 1), Copy("dgrad", operand, 0)]
    fprop, dgrad = EmulatedBackend().quantize(x.bfloat16(), origin(x), copies)
    assert fprop.tensors[0].data_ptr() == dgrad.tensors[0].data_ptr()


def test_transform_cancels_in_the_product(x: Tensor) -> None:
    """(x H)(w H)^T = x w^T: checked through the backend with a format that hardly rounds."""
    backend = EmulatedBackend()
    plain, turned = Operand(Format.mxfp8), Operand(Format.mxfp8, rht_size=32, rht_signs=Signs.per_step)
    products = []
    for operand in (plain, turned):
        a = backend.quantize(x[:64], origin(x[:64]), [Copy("wgrad", operand, 1)])[0]
        b = backend.quantize(x[64:], origin(x[64:]), [Copy("wgrad", operand, 1)])[0]
        products.append(backend.matmul(a, b, out_dtype=torch.float32))
    exact = x[:64] @ x[64:].T
    for result in products:
        assert (result - exact).norm() < 0.05 * exact.norm()


def test_noise_and_signs_follow_the_step(x: Tensor) -> None:
    """Equal steps must repeat (recompute, resume); different steps must not reuse the same noise."""
    backend = EmulatedBackend()
    copy = Copy("dgrad", Operand(N4, rounding=Rounding.sr), 1)
    first, repeated, later = (values(backend.quantize(x, origin(x, step), [copy])[0], backend) for step in (3, 3, 4))
    assert torch.equal(first, repeated)
    assert not torch.equal(first, later)


@pytest.fixture(scope="module")
def compiled() -> EmulatedBackend:
    return EmulatedBackend(compile=True)


COMPILED = [
    {"operand": Operand(N4), "along": 1},
    {"operand": Operand(N4, tile=(16, 16)), "along": 1},
    {"operand": Operand(N4, rounding=Rounding.sr), "along": 1},
    {"operand": Operand(N4, rounding=Rounding.sr, rht_size=16), "along": 0},
    {"operand": Operand(N4, four_over_six=FourOverSix.mse), "along": 0},
    {"operand": Operand(N4, rounding=Rounding.ms_eden, rht_size=16, rht_signs=Signs.per_index), "along": 0},
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_equals_eager(case: dict[str, Any], compiled: EmulatedBackend, x: Tensor) -> None:
    """A difference: the compiler reordered or contracted arithmetic, and emulation depends on the machine."""
    copy = Copy("wgrad", case["operand"], case["along"])
    for rows in (64, 128):  # the second size must not need another kernel
        part = x[:rows].bfloat16()
        eager = EmulatedBackend().quantize(part, origin(part), [copy])[0]
        fused = compiled.quantize(part, origin(part), [copy])[0]
        assert torch.equal(eager.tensors[0], fused.tensors[0])
        assert torch.equal(eager.tensors[1], fused.tensors[1])
