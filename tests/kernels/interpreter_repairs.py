"""Repairs of the faults of Triton 3.8.0's interpreter that the kernels meet. For tests: a run on a CPU meets none.

Of its six faults, three are repaired here. Two belong to instructions that kernels have on a GPU and spell out by
integers on a CPU (`arithmetic.INTERPRETED`): FP32 is truncated to BF16, and inline assembly is refused. The third is
met by products on FP4 tensor cores only, and on a CPU codes are decoded: `dot_scaled` reads every scale as a power of
two, also E4M3 ones.

No kernel meets the other three (test_repairs.py). FP32 is rounded half up to E4M3 and not saturated: codes are made by
integers. BF16 denormals are widened wrongly: tensors are loaded as bits. `dot` multiplies the bit patterns of BF16 as
integers: operands are decoded to FP16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from megatron_fp4.kernels import arithmetic, quantize
from megatron_fp4.numerics.formats import E2M1_VALUES


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    """FP32 values of E4M3 codes."""
    return torch.from_numpy(np.ascontiguousarray(codes).view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()


def bf16_rounded(x: np.ndarray) -> np.ndarray:
    """The FP32 numbers nearest to x that BF16 has."""
    return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().float().numpy()


def e2m1_codes(x: np.ndarray) -> np.ndarray:
    """What PTX says of `cvt.rn.satfinite.e2m1x2.f32`, by distances: nearest, of two the even code; above 6 it is 6, NaN
    is +6, and -0 keeps its sign."""
    size = np.minimum(np.abs(x.astype(np.float64)), 6.0)
    distances = np.abs(size[..., None] - np.array(E2M1_VALUES))
    nearest = distances == distances.min(-1, keepdims=True)
    first, tie = nearest.argmax(-1), nearest.sum(-1) == 2
    code = first + (tie & (first % 2 == 1)) + 8 * np.signbit(x)
    return np.where(np.isnan(x), 7, code).astype(np.int32)


ASSEMBLY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    arithmetic.ROUND_TO_BF16.value: lambda x: bf16_rounded(x).view(np.int32),
    arithmetic.TO_E2M1.value: e2m1_codes,
}
"""What the kernels' inline assembly computes. It proves nothing about the order of operands."""


@contextmanager
def e4m3_scales() -> Iterator[None]:
    """`tl.dot_scaled` with E4M3 scales gives the right numbers."""
    prepare = interpreter._prepare_dot_scaled_operand

    def prepared(value: Any, scale: Any, element: Any, k_pack: bool, is_rhs: bool) -> np.ndarray:
        if scale is None or scale.dtype.scalar != tl.float8e4nv:
            return prepare(value, scale, element, k_pack, is_rhs)
        values = prepare(value, None, element, k_pack, is_rhs)
        axis = -2 if is_rhs else -1
        factors = e4m3_values(scale.data)
        factors = np.repeat(factors, values.shape[axis] // factors.shape[-1], axis=-1)
        return values * (np.swapaxes(factors, -1, -2) if is_rhs else factors)

    with mock.patch.object(interpreter, "_prepare_dot_scaled_operand", prepared):
        yield


@contextmanager
def bf16_rounding() -> Iterator[None]:
    """FP32 becomes the nearest BF16."""
    convert = interpreter._convert_float

    def converted(data: np.ndarray, source: Any, result: Any, rounding: Any) -> np.ndarray:
        if (source.scalar, result.scalar) != (tl.float32, tl.bfloat16):
            return convert(data, source, result, rounding)
        return (bf16_rounded(data).view(np.uint32) >> 16).astype(np.uint16)

    with mock.patch.object(interpreter, "_convert_float", converted):
        yield


@contextmanager
def inline_assembly() -> Iterator[None]:
    """The kernels' inline assembly is interpreted."""

    def assembled(_: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int) -> Any:
        result = interpreter.TensorHandle(ASSEMBLY[text](values[0].data), tl.int32)
        return SimpleNamespace(get_result=lambda index: result)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_inline_asm", assembled):
        yield


@contextmanager
def device_code() -> Iterator[None]:
    """Kernels are interpreted as a GPU gets them: with its tiles and its instructions."""
    with (
        e4m3_scales(),
        bf16_rounding(),
        inline_assembly(),
        mock.patch.object(arithmetic, "INTERPRETED", tl.constexpr(False)),
        mock.patch.object(quantize, "INTERPRETED", False),
    ):
        yield
