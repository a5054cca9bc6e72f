"""FP8 block GEMMs by `scaled_mm`, without the GPU that it needs.

Every call goes through torch's own shape check of the operator (its meta kernel), and is then computed on decoded
operands: so layouts, strides, types and which scale belongs to which block are checked, and no kernel is. (One test
runs the kernels where there is a Hopper GPU; it has never been run.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.planning.memory import weight_copy_bytes
from megatron_fp4.precision import (
    Dgrad,
    EmulatedBackend,
    Format,
    Fprop,
    LinearPrecision,
    NonFiniteError,
    Operand,
    Sharding,
    StepClock,
    WeightCache,
    Wgrad,
    nvfp4_paper,
    quantized_linear,
)
from megatron_fp4.precision.backends import (
    Backend,
    Copy,
    NonFiniteWatch,
    OperandOrigin,
    QuantizedOperand,
    copies_of,
    native_fp8,
)
from megatron_fp4.precision.backends.native_fp8 import NativeFp8Backend
from megatron_fp4.precision.config import BackendName, ComputeDtype, PrecisionConfig

ROW, SQUARE = Operand(Format.fp8_block), Operand(Format.fp8_block, tile=(128, 128))
PAPER = LinearPrecision(fprop=Fprop(ROW, SQUARE), dgrad=Dgrad(ROW, SQUARE), wgrad=Wgrad(ROW, ROW))
SHAPES = [(256, 384, 640), (128, 128, 128), (384, 128, 512)]  # T, N, K: blocks of K 5 (padded to 8), 1 and 4


def config(recipe: LinearPrecision, **settings: Any) -> PrecisionConfig:
    return PrecisionConfig(recipes={"r": recipe}, compile=False, **settings)


def decode(codes: Tensor, scale: Tensor, recipe: ScalingType) -> Tensor:
    """FP64 `[M, K]`."""
    assert codes.dtype == torch.float8_e4m3fn
    if recipe is ScalingType.BlockWise128x128:
        scale = scale.T[:, : codes.shape[1] // 128].repeat_interleave(128, 0)
    return codes.double() * scale.double().repeat_interleave(128, 1)


def checked_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, how_a: Any, scale_b: Tensor, how_b: Any, **options: Any
) -> Tensor:
    on_meta = [tensor.to("meta") for tensor in (a, b, scale_a, scale_b)]
    assert [t.stride() for t in on_meta] == [t.stride() for t in (a, b, scale_a, scale_b)]
    shape_and_type = scaled_mm(on_meta[0], on_meta[1], on_meta[2], how_a, on_meta[3], how_b, **options)
    out = decode(a, scale_a, how_a) @ decode(b.T, scale_b, how_b).T
    assert shape_and_type.shape == out.shape
    return out.to(shape_and_type.dtype)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native_fp8, "scaled_mm", checked_mm)
    return monkeypatch


def tensor(name: str, rows: int, cols: int) -> Tensor:
    """Gaussian, with rows of very different size, so that a scale in the wrong place is seen."""
    x = normal(key_of(name), torch.arange(rows), torch.arange(cols))
    return (x * 2.0 ** (torch.arange(rows)[:, None] % 23 - 11) * 3.0 ** (torch.arange(cols) // 64 % 5)).bfloat16()


def origin(x: Tensor) -> OperandOrigin:
    rows, cols = (torch.arange(size) for size in x.shape)
    return OperandOrigin("blocks.0.mlp.up", "x", rows, cols, Group.single(), 1, 0)


@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_operands_are_the_emulated_ones(T: int, N: int, K: int, hopper: pytest.MonkeyPatch) -> None:
    backend, emulated = NativeFp8Backend(config(PAPER)), EmulatedBackend()
    for name, shape in {"x": (T, K), "w": (N, K), "dy": (T, N)}.items():
        x, copies = tensor(name, *shape), [replace(copy, deferred=False) for copy in copies_of(PAPER)[name]]
        for copy, native, ours in zip(copies, *(quantized(b, x, copies) for b in (backend, emulated)), strict=True):
            codes, scale = native.tensors
            got = decode(codes, scale, native_fp8.RECIPES[native.tile])
            (values,) = ours.tensors
            assert torch.equal(got, (values if copy.along == 1 else values.T).double()), f"{copy.gemm}.{name}"
            assert codes.is_contiguous(), "Hopper multiplies operands with the contraction contiguous only"


def quantized(backend: Backend, x: Tensor, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
    return backend.quantize(x, origin(x), copies)


def linear(
    backend: Backend, precision: LinearPrecision, T: int, N: int, K: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and the weight gradient, added to ones."""
    x, w, dy = (tensor(name, *shape).to(device) for name, shape in (("x", (T, K)), ("w", (N, K)), ("dy", (T, N))))
    x, weight, alone = x.requires_grad_(), LogicalParameter.whole("w", w), Group.single()
    weight.main_grad = torch.ones(N, K, device=device)
    rows, n_index, k_index = (torch.arange(size, device=device) for size in (T, N, K))
    y = quantized_linear(
        x,
        weight,
        rows=rows,
        sharding=Sharding("l", alone, alone, alone, n_index, k_index),
        precision=precision,
        backend=backend,
        clock=StepClock(seed=1),
        cache=WeightCache(),
    )
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad, weight.main_grad


WITHOUT_WGRAD = LinearPrecision(fprop=PAPER.fprop, dgrad=PAPER.dgrad)


@pytest.mark.parametrize("precision", [PAPER, WITHOUT_WGRAD], ids=["all", "wgrad in bf16"])
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_a_linear_computes_as_emulated(
    T: int, N: int, K: int, precision: LinearPrecision, hopper: pytest.MonkeyPatch
) -> None:
    compare(precision, T, N, K, "cpu", limits=(2**-9, 2**-9, 1e-5))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize(("T", "N", "K"), SHAPES)
def test_tensor_cores_compute_as_emulated(T: int, N: int, K: int) -> None:
    """Bounds for partial sums of about 14 bits, which is all that Hopper is said to keep (arXiv 2412.19437, 3.3.2)."""
    compare(PAPER, T, N, K, "cuda", limits=(2**-8, 2**-8, 2**-8))


def compare(
    precision: LinearPrecision, T: int, N: int, K: int, device: str, limits: tuple[float, float, float]
) -> None:
    native, emulated = NativeFp8Backend(config(precision)), EmulatedBackend()
    results = (linear(backend, precision, T, N, K, device) for backend in (native, emulated))
    for name, limit, got, wanted in zip(("y", "dx", "dw"), limits, *results, strict=True):
        assert got.dtype == wanted.dtype, name
        error = (got.double() - wanted.double()).norm() / wanted.double().norm()
        assert error < limit, f"{name}: {error}: other operands, or a sum that is lost"


def test_nan_and_inf(hopper: pytest.MonkeyPatch) -> None:
    x = tensor("x", 128, 256)
    x[3, 200] = float("nan")
    with pytest.raises(NonFiniteError, match=r"blocks\.0\.mlp\.up: operand x"):
        quantized(NativeFp8Backend(config(PAPER)), x, copies_of(PAPER)["x"])
    watch = NonFiniteWatch()
    quantized(NativeFp8Backend(config(PAPER), watch), x, copies_of(PAPER)["x"])
    assert [str(event) for event in watch.take()] == ["blocks.0.mlp.up (x, rank 0)"]


def test_sizes_that_tensor_cores_refuse(hopper: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"multiples of 16, got 24.*backend=emulated"):
        quantized(NativeFp8Backend(config(PAPER)), tensor("x", 24, 128), [Copy("fprop", ROW, 1)])
    with pytest.raises(ValueError, match="multiple of 128"):
        quantized(NativeFp8Backend(config(PAPER)), tensor("x", 128, 192), [Copy("fprop", ROW, 1)])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (config(nvfp4_paper()), "recipe r, fprop: operands in nvfp4, but only GEMMs of two fp8_block operands"),
        (config(LinearPrecision(fprop=Fprop(ROW, Operand()))), "operands in bf16 and fp8_block"),
        (config(LinearPrecision(wgrad=Wgrad(SQUARE, SQUARE))), "recipe r, wgrad: two operands in 128x128 tiles"),
        (config(LinearPrecision()), "has no effect"),
        (config(LinearPrecision(wgrad=Wgrad(*[replace(ROW, rht_size=16)] * 2))), "a Hadamard transform, which its"),
        (config(PAPER, compute_dtype=ComputeDtype.fp32), "proof mode"),
    ],
)
def test_recipes_that_are_refused(settings: PrecisionConfig, reason: str, hopper: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=rf"{reason}.*precision\.backend=emulated"):
        NativeFp8Backend(settings)


@pytest.mark.parametrize(
    ("capability", "cuda", "reason"),
    [
        ((8, 9), "13.0", r"9\.x \(Hopper\).*this one has 8\.9"),
        ((10, 0), "13.0", r"9\.x \(Hopper\).*this one has 10\.0"),
        ((9, 0), "12.8", r"CUDA 12\.9 or newer, this one is for 12\.8"),
        ((9, 0), "12.10", None),
    ],
)
def test_gpus_that_are_refused(
    capability: tuple[int, int], cuda: str, reason: str | None, hopper: pytest.MonkeyPatch
) -> None:
    hopper.setattr(torch.cuda, "get_device_capability", lambda: capability)
    hopper.setattr(torch.version, "cuda", cuda)
    if reason is None:
        NativeFp8Backend(config(PAPER))
        return
    with pytest.raises(ValueError, match=reason):
        NativeFp8Backend(config(PAPER))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch sees no CUDA device.*backend=emulated"):
        NativeFp8Backend(config(PAPER))


def test_the_planner_counts_codes_of_both_directions() -> None:
    row_weights = LinearPrecision(fprop=Fprop(ROW, ROW), dgrad=Dgrad(ROW, ROW))
    for backend, expected in ((BackendName.native_fp8, 2.0), (BackendName.emulated, 4.0)):
        assert weight_copy_bytes(row_weights, backend, 2) == expected
