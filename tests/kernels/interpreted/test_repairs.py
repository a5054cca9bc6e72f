"""The faults of Triton's interpreter that the tests repair. A failure here says that a repair may go."""

from __future__ import annotations

import torch

from megatron_fp4.kernels.multiply import multiply
from megatron_fp4.precision.backends.product import scaled_matmul
from tests.kernels.interpreted.test_products import NATIVE, NVFP4, as_stored, decoded, operand
from tests.kernels.interpreter_repairs import e4m3_scales


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
