"""The emulated backend on a CUDA GPU: the operands of the CPU, bit for bit, eager and compiled by Triton."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import AmaxScope, EmulatedBackend, Format, FourOverSix, Operand, Rounding, Signs
from megatron_fp4.precision.backends import Copy, OperandOrigin
from megatron_fp4.precision.backends.product import scaled_matmul

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

N4 = Format.nvfp4
OPERANDS = [
    Operand(N4),
    Operand(N4, tile=(16, 16)),
    Operand(N4, rounding=Rounding.sr),
    Operand(N4, rounding=Rounding.sr, rht_size=16),
    Operand(N4, four_over_six=FourOverSix.mae),
    Operand(N4, rounding=Rounding.ms_eden, rht_size=16, rht_signs=Signs.per_index),
    Operand(N4, amax_scope=AmaxScope.group128),
    Operand(Format.mxfp4),
    Operand(Format.mxfp8),
    Operand(Format.fp8_block),
]


def prepare(x: Tensor, operand: Operand, along: int, backend: EmulatedBackend) -> tuple[Tensor, ...]:
    rows, cols = (torch.arange(size, device=x.device) for size in x.shape)
    origin = OperandOrigin("blocks.0.mlp.up", "dy", rows, cols, Group.single(), seed=1, step=3)
    (prepared,) = backend.quantize(x, origin, [Copy("wgrad", operand, along)])
    return tuple(tensor.cpu() for tensor in prepared.tensors)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("operand", OPERANDS, ids=lambda operand: f"{operand.format.name}-{operand.rounding.name}")
@pytest.mark.parametrize("along", [0, 1])
def test_operands_equal_those_of_the_cpu(operand: Operand, along: int, compile: bool) -> None:
    """A difference: a division was approximated or a multiply-add contracted, and emulation depends on the device."""
    x = normal(key_of("cuda"), torch.arange(256), torch.arange(512)).bfloat16()
    expected = prepare(x, operand, along, EmulatedBackend())
    got = prepare(x.cuda(), operand, along, EmulatedBackend(compile=compile))
    for ours, theirs in zip(got, expected, strict=True):
        wrong = (ours != theirs).sum().item()
        assert wrong == 0, f"{wrong} of {ours.numel()} elements differ"


@pytest.mark.parametrize("length", [512, 65536])
def test_bf16_products_are_rounded_once(length: int) -> None:
    """Sums of integers are exact, so only a rounding of their parts, or a second one, could change the result."""
    gen = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-12, 13, (64, length), generator=gen).bfloat16() for _ in range(2))
    exact = a.double() @ b.double().T
    assert torch.equal(scaled_matmul(a.cuda(), b.cuda(), out_dtype=torch.bfloat16).cpu(), exact.bfloat16())
    total = torch.full((64, 64), 3.0, device="cuda")
    scaled_matmul(a.cuda(), b.cuda(), out_dtype=torch.float32, accumulate_into=total)
    assert torch.equal(total.cpu(), (exact + 3).float())
