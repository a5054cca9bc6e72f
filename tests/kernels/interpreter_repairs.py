"""Repairs of Triton 3.8.0's interpreter that products of codes need. For tests: a run never multiplies by `dot_scaled`
on a CPU.

`dot_scaled` reads every scale as a power of two, also E4M3 ones. The other faults (BF16 is truncated, its denormals
widen wrongly and are multiplied as integers, E4M3 is rounded half up, inline assembly is refused) are met by no kernel:
tensors are bits there (arithmetic.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def e4m3_values(codes: np.ndarray) -> np.ndarray:
    """FP32 values of E4M3 codes."""
    return torch.from_numpy(np.ascontiguousarray(codes).view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()


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
