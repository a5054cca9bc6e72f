"""Products of codes: exact where every sum is, within FP32 rounding elsewhere, in every branch and at odd sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fp4.kernels import gemm
from megatron_fp4.kernels.layout import swizzled_scales
from megatron_fp4.kernels.multiply import multiply
from megatron_fp4.kernels.values import Coding, GemmTile, PackedOperand, Target
from megatron_fp4.numerics import QuantizedTensor
from megatron_fp4.precision.backends.product import GlobalScale, scaled_matmul
from tests.kernels.interpreter_repairs import e4m3_scales

BF16 = torch.bfloat16
SMALL = GemmTile(32, 32, 64, 4, 1)
"""Several tiles of each kind even in a small product."""
DECODED = Target(native=False, persistent=False, programs=1, gemm=SMALL, fp8=SMALL)
NATIVE = replace(DECODED, native=True)
PERSISTENT = Target(native=True, persistent=True, programs=2, gemm=GemmTile(128, 128, 256, 8, 4), fp8=SMALL)
TARGETS = {"decoded": DECODED, "dot_scaled": NATIVE, "TMA": PERSISTENT}
NVFP4, MXFP4, MXFP8 = Coding(2688.0, 16), Coding(0.0, 32), Coding(0.0, 32, bits=8)


@pytest.fixture(autouse=True)
def _repaired() -> Iterator[None]:
    with e4m3_scales():
        yield


def operand(lines: int, length: int, how: Coding, seed: int, *, exact: bool) -> PackedOperand:
    """Random codes with row-major scales; exact: every partial sum of products is an FP32 number."""
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (lines, length * how.bits // 8), generator=gen, dtype=torch.uint8)
    blocks = lines, length // how.block
    if how.bits == 8:  # no NaN; exact: integers of three bits
        codes = (codes & 0x80) | (
            codes % 0x7F if not exact else torch.tensor([0x38, 0x40, 0x44])[codes.long() % 3].to(torch.uint8)
        )
    if how.aim:
        scales = torch.tensor([0x30, 0x38, 0x40], dtype=torch.uint8)[torch.randint(0, 3, blocks, generator=gen)]
        scales = scales if exact else torch.randint(0, 127, blocks, generator=gen, dtype=torch.uint8)
    else:
        scales = torch.randint(126, 129 if exact else 140, blocks, generator=gen, dtype=torch.uint8)
    amax = torch.tensor(3.7 if seed else 0.0123) if how.aim else None
    return PackedOperand(codes, scales, amax, how)


def decoded(packed: PackedOperand) -> tuple[Tensor, GlobalScale | None]:
    codes = packed.codes if packed.how.bits == 4 else packed.codes.view(torch.float8_e4m3fn)
    scales = packed.scales.view(torch.float8_e4m3fn if packed.how.aim else torch.float8_e8m0fnu)
    values = QuantizedTensor(codes, scales, None).operand(torch.float32)
    return values, None if packed.amax is None else GlobalScale(packed.amax, packed.how.aim)


def as_stored(packed: PackedOperand, target: Target) -> PackedOperand:
    return replace(packed, scales=swizzled_scales(packed.scales)) if target.native else packed


@pytest.mark.parametrize("how", [NVFP4, MXFP4, MXFP8], ids=["nvfp4", "mxfp4", "mxfp8"])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("size", [(64, 96, 128), (40, 72, 352)], ids=str)
def test_products(how: Coding, name: str, size: tuple[int, int, int]) -> None:
    """To BF16, to FP32, and added to FP32 without and with a rounding to BF16 before: alpha comes first."""
    target = TARGETS[name]
    M, N, K = size
    for exact in (True, False):
        a, b = operand(M, K, how, 0, exact=exact), operand(N, K, how, 1, exact=exact)
        (left, a_scale), (right, b_scale) = decoded(a), decoded(b)
        stored = as_stored(a, target), as_stored(b, target)
        start = torch.randn(M, N)
        terms = scaled_matmul(left.abs(), right.abs(), a_scale=a_scale, b_scale=b_scale, out_dtype=torch.float32)
        for out_dtype, total in (
            (BF16, None),
            (torch.float32, None),
            (torch.float32, start),
            (BF16, start),
        ):
            expected = scaled_matmul(
                left, right, a_scale=a_scale, b_scale=b_scale, out_dtype=torch.float32
            ).to(out_dtype)  # fmt: skip
            out = torch.empty(M, N, dtype=out_dtype)
            if total is not None:
                out, expected = total.clone(), total.clone().add_(expected)
            rounded = total is not None and out_dtype == BF16
            multiply(*stored, out, target=target, accumulate=total is not None, rounded=rounded)
            if exact:
                assert torch.equal(out, expected), f"{out_dtype}, accumulated: {total is not None}"
            else:
                roundings = 2.0**-7 if out_dtype == BF16 else 2.0**-23
                bound = terms * 2.0**-20 + (expected.float().abs() + terms) * roundings
                assert bool(((out.float() - expected.float()).abs() <= bound).all())


@pytest.mark.parametrize("name", TARGETS)
def test_every_tile_of_a_tall_product(name: str) -> None:
    """More than one group of eight rows of tiles, the last one lower, several columns: no tile twice, none missing."""
    target = TARGETS[name]
    M, N, K = 9 * target.gemm.rows + 8, 2 * target.gemm.columns + 8, 64
    a, b = operand(M, K, NVFP4, 0, exact=True), operand(N, K, NVFP4, 1, exact=True)
    (left, a_scale), (right, b_scale) = decoded(a), decoded(b)
    out = torch.full((M, N), float("nan"))
    multiply(as_stored(a, target), as_stored(b, target), out, target=target)
    assert torch.equal(out, scaled_matmul(left, right, a_scale=a_scale, b_scale=b_scale, out_dtype=torch.float32))


@pytest.mark.parametrize("fault", ["one nibble twice", "the scale of the next block"])
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gemm.decoded
    wrong = {
        "one nibble twice": lambda codes, scales, rows, cols: right((codes & 15) | (codes << 4), scales, rows, cols),
        "the scale of the next block": lambda codes, scales, rows, cols: right(codes, scales + 8, rows, cols),
    }
    monkeypatch.setitem(gemm.gemm_kernel.fn.__globals__, "decoded", wrong[fault])
    with pytest.raises(AssertionError):
        test_products(NVFP4, "decoded", (40, 72, 352))
