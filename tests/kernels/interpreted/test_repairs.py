"""The faults of Triton's interpreter: those that kernels meet are repaired, the others are met by none.

A failure of a test that says what is wrong there says that a repair, or a rule of arithmetic.py, may go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_fp4.kernels.multiply import multiply
from megatron_fp4.numerics import formats
from megatron_fp4.precision.backends.product import scaled_matmul
from tests.kernels.inputs import hostile
from tests.kernels.interpreted import device_functions
from tests.kernels.interpreted.test_operands import PAPER, assert_equal
from tests.kernels.interpreted.test_products import MXFP4, MXFP8, NATIVE, NVFP4, TARGETS, as_stored, decoded, operand
from tests.kernels.interpreter_repairs import bf16_rounding, device_code, e2m1_codes, e4m3_scales, inline_assembly

BF16, N = torch.bfloat16, 64


def test_dot_scaled_reads_e4m3_scales_as_powers_of_two() -> None:
    a, b = operand(32, 64, NVFP4, 0, exact=True), operand(32, 64, NVFP4, 1, exact=True)
    (left, a_scale), (right, b_scale) = decoded(a), decoded(b)
    expected = scaled_matmul(left, right, a_scale=a_scale, b_scale=b_scale, out_dtype=torch.float32)
    out = torch.empty(32, 32)
    multiply(as_stored(a, NATIVE), as_stored(b, NATIVE), out, target=NATIVE)
    assert not torch.equal(out, expected)
    with e4m3_scales():
        multiply(as_stored(a, NATIVE), as_stored(b, NATIVE), out, target=NATIVE)
    assert torch.equal(out, expected)


def test_fp32_is_truncated_to_bf16() -> None:
    x = hostile(4, 16)["all exponents"].flatten().float() * 1.003
    out = torch.empty(N, dtype=BF16)
    device_functions.rounded_to_bf16[(1,)](x, out, N)
    assert not torch.equal(out, x.to(BF16))
    with bf16_rounding():
        device_functions.rounded_to_bf16[(1,)](x, out, N)
    assert torch.equal(out, x.to(BF16))


def test_inline_assembly_is_refused() -> None:
    x = hostile(4, 16)["ties"].flatten().float()
    out = torch.empty(N, dtype=torch.int32)
    with pytest.raises(interpreter.InterpreterError, match="not supported in interpreter mode"):
        device_functions.encode[(1,)](x, out, out, out, N, True)
    with inline_assembly():
        device_functions.encode[(1,)](x, torch.empty_like(out), out, torch.empty_like(out), N, True)
    assert torch.equal(out.to(torch.uint8), formats.encode_e2m1(x))


def test_the_instruction_for_e2m1_has_the_codes_of_the_integers() -> None:
    """What PTX says of it, at every decision point and its neighbours, in between, beyond, and for -0."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 1e38])
    bits = points.view(torch.int32)[:, None] + torch.arange(-512, 512, dtype=torch.int32)
    x = torch.cat([bits.flatten().clamp(min=0), torch.arange(0, 0x7F80 << 16, 1 << 15, dtype=torch.int32)])
    x = torch.cat([x, x | -(2**31)])
    x = torch.nn.functional.pad(x, (0, -len(x) % (1 << 18))).view(torch.float32)
    codes = {instruction: torch.empty(len(x), dtype=torch.int32) for instruction in (False, True)}
    unused = torch.empty_like(codes[True])
    with inline_assembly():
        for instruction, out in codes.items():
            device_functions.encode[(1,)](x, unused, out, unused, len(x), instruction)
    assert torch.equal(codes[True], codes[False])
    assert torch.equal(codes[True].to(torch.uint8), formats.encode_e2m1(x))
    assert e2m1_codes(np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)).tolist() == [7, 7, 15, 8]


FAULTS: dict[str, tuple[Any, torch.Tensor, torch.Tensor]] = {
    "FP32 is rounded half up to E4M3": (
        device_functions.rounded_to_e4m3,
        torch.linspace(0, 500, N),
        torch.linspace(0, 500, N).clamp(max=448).to(torch.float8_e4m3fn),
    ),
    "BF16 denormals are widened wrongly": (
        device_functions.widened,
        hostile(4, 16)["denormals"].flatten(),
        hostile(4, 16)["denormals"].flatten().float(),
    ),
    "BF16 is multiplied as integers": (
        device_functions.multiplied,
        torch.eye(16, dtype=BF16),
        torch.eye(16),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_other_faults(fault: str) -> None:
    kernel, x, expected = FAULTS[fault]
    out = torch.empty_like(expected)
    kernel[(1,)](x, out, x.shape[0])
    assert not torch.equal(out.view(torch.uint8), expected.view(torch.uint8))


@contextmanager
def without_the_other_faults() -> Iterator[None]:
    """What would meet one of them raises."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(data: np.ndarray, source: Any, result: Any, rounding: Any) -> np.ndarray:
        assert source.scalar != tl.bfloat16
        assert result.scalar != tl.float8e4nv
        return convert(data, source, result, rounding)

    def multiplied(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        assert tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar)
        return dot(builder, a, b, *rest)

    with (
        mock.patch.object(interpreter, "_convert_float", converted),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", multiplied),
    ):
        yield


@pytest.mark.parametrize("code", [nullcontext, device_code], ids=["as a CPU has them", "as a GPU has them"])
def test_no_kernel_meets_the_other_faults(code: Any) -> None:
    x = hostile(32, 64)["ties"]
    with code(), without_the_other_faults():
        for tensor, copies in PAPER.items():
            assert_equal(x, copies, "ties", tensor)
        for how in (NVFP4, MXFP4, MXFP8):
            for target in TARGETS.values():
                a, b = operand(16, 64, how, 0, exact=True), operand(16, 64, how, 1, exact=True)
                multiply(as_stored(a, target), as_stored(b, target), torch.empty(16, 16, dtype=BF16), target=target)
