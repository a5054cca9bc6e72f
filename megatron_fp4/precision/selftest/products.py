"""The product of two operands against the exact one: as the backend sums it, and as a training step asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.precision.backends import Backend, QuantizedOperand
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.selftest.linear_case import LinearCase
from megatron_fp4.precision.spec import Gemm

GEMM_BOUND = 2.0**-12
"""Error of a product, relative to that of the absolute values: accumulation in FP32 with some bits lost."""
BF16_BOUND = 2.0**-8
"""Relative error of one rounding to BF16."""
MAIN_GRAD = 1.0
"""What an accumulated product is added to, in multiples of its largest element."""

Operands = dict[tuple[str, str], QuantizedOperand]
"""(GEMM, tensor) -> operand."""


@dataclass(frozen=True)
class Finding:
    """What was compared and what came out."""

    what: str
    text: str
    wrong: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.text}"


def compare_product(
    case: LinearCase, gemm: Gemm, backend: Backend, theirs: Operands, ours: Operands, largest: Mapping[str, float]
) -> Finding:
    """One GEMM of `theirs` in FP32, and as a step asks for it, against the FP64 product of the reference's operands.

    A step asks for BF16, and for a sum into an FP32 tensor in Wgrad. largest: max |x| of each tensor.
    """
    a, b = ((gemm.name, tensor) for tensor in gemm.tensors)
    exact = ReferenceBackend().matmul(ours[a], ours[b], out_dtype=torch.float64)
    sizes = dict(zip("TNK", (case.tokens, *case.shape), strict=True))
    product = backend.matmul(theirs[a], theirs[b], out_dtype=torch.float32)
    error = _largest_error(product, exact)
    largest_sum = exact.abs().max().item()
    limit = GEMM_BOUND * max(largest_sum, largest[a[1]] * largest[b[1]] * sizes[gemm.contracted] ** 0.5)
    if gemm.name == "wgrad":
        start = torch.full_like(product, MAIN_GRAD * largest_sum)
        asked = backend.matmul(theirs[a], theirs[b], out_dtype=torch.float32, accumulate_into=start)
        asked_error, asked_limit = _largest_error(asked, exact + MAIN_GRAD * largest_sum), limit
    else:
        asked = backend.matmul(theirs[a], theirs[b], out_dtype=torch.bfloat16)
        asked_error, asked_limit = _largest_error(asked, exact), limit + BF16_BOUND * largest_sum
    how = "added to main_grad" if gemm.name == "wgrad" else "in BF16"
    wrong = not (error <= limit and asked_error <= asked_limit)
    return Finding(
        gemm.name,
        f"largest error {error:.2e}, limit {limit:.2e}; {how} {asked_error:.2e}, limit {asked_limit:.2e}",
        wrong=wrong,
    )


def _largest_error(product: Tensor, exact: Tensor) -> float:
    return (product.to(exact.device).double() - exact).abs().max().item()
