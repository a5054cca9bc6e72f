"""The self-test of a backend on one device: operands, products and gradients of every precision that a run uses.

Tensors are made of integers, so they are equal to the bit on every machine, and the reference computes on the CPU: a
card is held against what a laptop computes, not against itself. `GOLDEN` holds what the reference makes of them, so a
torch that computes otherwise is seen as well. Shapes fill no tile of the kernels and are small: seconds, not minutes.

Not here: the shapes of a run (`megatron-fp4 preflight`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_fp4.numerics import key_of
from megatron_fp4.numerics.random import random_bits
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.recipes import RECIPES
from megatron_fp4.precision.selftest.gemms import gemm_objections
from megatron_fp4.precision.selftest.linear_case import LinearCase
from megatron_fp4.precision.selftest.operands import compare_operands, cross_check, quantized
from megatron_fp4.precision.spec import LinearPrecision

SIZES = {"T": 288, "N": 160, "K": 544}
"""Multiples of 32 and not of 128, one of them with a rest of the deepest tile: every kind of tail."""
POWERS = {"x": -8, "w": -13, "dy": -17}
"""Exponents of two that bring integers with a standard deviation of 148 to the sizes that tensors have in training."""
GOLDEN = {
    "nvfp4": "aa4508a53455d022",
    "mxfp4": "d7779625aab13805",
    "mxfp8": "018565038e9557a3",
    "fp8": "6d6df982901c8fa6",
}
"""Digests of the reference's operands, by recipe."""
CPU = torch.device("cpu")


def case_of(precision: LinearPrecision) -> LinearCase:
    """The linear that is computed: `SIZES`, up to the next multiple of what the precision needs."""
    T, N, K = SIZES.values()
    for gemm in precision.gemms:
        multiples = gemm.multiples()
        T, N, K = (-(-size // multiples[dim]) * multiples[dim] for dim, size in zip("TNK", (T, N, K), strict=True))
    return LinearCase("selftest", (N, K), T, precision)


def golden_tensors(case: LinearCase, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """x, w and dy on the CPU: sums of four random bytes, bell-shaped, times a power of two. Exact on every machine."""
    return {
        name: (_integers(name, *shape) * 2.0 ** POWERS[name]).to(torch.bfloat16).to(dtype)
        for name, shape in case.shapes.items()
    }


def hostile_tensors(case: LinearCase, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Rows of all sizes, blocks of zeros, -0, and sixteenths that lie on the ties of codes."""
    tensors = {}
    for name, (R, C) in case.shapes.items():
        x = _integers(name, R, C)
        x[::5] = (x[::5] / 16).round() / 4 * 7  # max 7 * 2^k: scales are powers of two, and quarters are ties
        x *= torch.exp2(torch.arange(R) * 7 % 41 - 20.0).view(-1, 1)
        blocks = x.view(-1, 16)
        blocks[::3], blocks[1::11] = 0.0, -0.0
        tensors[name] = x.to(torch.bfloat16).to(dtype)
    return tensors


def self_test(
    backend: Backend, precisions: Iterable[LinearPrecision], device: torch.device, dtype: torch.dtype
) -> list[str]:
    """What is wrong with `backend` on `device`, one line each; empty if it can be trusted.

    dtype: the compute dtype. An exception is a kernel that broke.
    """
    wrong: list[str] = []
    for precision in precisions:
        case = case_of(precision)
        tensors = golden_tensors(case, dtype)
        on_device = _moved(tensors, device)
        findings = cross_check(case, backend, on_device, CPU)
        if not isinstance(backend, TransformerEngineBackend):  # which promises no bits for denormals and -0
            hostile = hostile_tensors(case, dtype)
            findings += compare_operands(case, backend, _moved(hostile, device), hostile)[2]
        wrong += [str(finding) for finding in findings if finding.wrong]
        wrong += gemm_objections(case, backend, on_device)
    return wrong


def golden_objections() -> list[str]:
    """The recipes of which this machine's reference makes other operands than the one that was written down."""
    digests = {name: digest_of(precision) for name, precision in RECIPES.items()}
    return [
        f"recipe {name}: the reference's operands are {digest}, not {GOLDEN[name]}"
        for name, digest in digests.items()
        if digest != GOLDEN[name]
    ]


def digest_of(precision: LinearPrecision) -> str:
    """Digest of all codes, scales and amaxes that the reference makes of the golden tensors."""
    case, content = case_of(precision), hashlib.blake2b(digest_size=8)
    operands = quantized(case, precision, ReferenceBackend(), golden_tensors(case))
    for _, operand in sorted(operands.items()):
        for part in operand.tensors:
            content.update(part.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def quantized_precisions(tables: Iterable[Mapping[str, LinearPrecision]]) -> Sequence[LinearPrecision]:
    """Every distinct precision of some tables in which something is quantized."""
    precisions = (precision for table in tables for precision in table.values())
    return list(dict.fromkeys(precision for precision in precisions if precision.quantized))


def _integers(name: str, rows: int, columns: int) -> Tensor:
    """FP32 whole numbers from -510 to 510."""
    bits = random_bits(key_of("selftest", name), torch.arange(rows), torch.arange(columns))
    return torch.stack([(bits >> shift) & 255 for shift in (0, 8, 16, 24)]).sum(0).float() - 510.0


def _moved(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
