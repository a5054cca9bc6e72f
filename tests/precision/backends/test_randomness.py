"""Which operands are others at each step: what the weight cache goes by, against what the quantizer does."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import AmaxScope, Format, FourOverSix, Operand, Rounding, ScaleOrder, Signs
from megatron_fp4.precision.backends import Copy, OperandOrigin
from megatron_fp4.precision.backends.randomness import varies_by_step
from megatron_fp4.precision.backends.reference import ReferenceBackend

N4 = Format.nvfp4
OPERANDS = [
    Operand(),
    *(Operand(fmt) for fmt in Format if fmt is not Format.bf16),
    *(Operand(N4, rounding=rounding) for rounding in Rounding),
    *(Operand(N4, rht_size=16, rht_signs=signs) for signs in Signs),
    Operand(N4, rounding=Rounding.sr, noise_bits=20),
    Operand(N4, tile=(16, 16)),
    Operand(N4, scale_order=ScaleOrder.paper),
    Operand(N4, amax_scope=AmaxScope.row),
    Operand(N4, four_over_six=FourOverSix.mse, four_over_six_bound=448),
    Operand(Format.mxfp4, rounding=Rounding.sr),
]


def operand_of(operand: Operand, seed: int, step: int) -> tuple[torch.Tensor, ...]:
    x = normal(key_of("randomness"), torch.arange(128), torch.arange(128)).bfloat16()
    origin = OperandOrigin("linear", "w", torch.arange(128), torch.arange(128), Group.single(), seed, step)
    return ReferenceBackend().quantize(x, origin, [Copy("fprop", operand, along=1)])[0].tensors


@pytest.mark.parametrize("operand", OPERANDS, ids=str)
def test_seed_and_step_go_into_an_operand_exactly_where_it_says_so(operand: Operand) -> None:
    """An operand that varies and says no: a cached weight with the noise or the signs of another step."""
    base = operand_of(operand, seed=1, step=3)
    for seed, step in ((1, 4), (2, 3)):
        other = operand_of(operand, seed, step)
        equal = all(torch.equal(a.float(), b.float()) for a, b in zip(base, other, strict=True))
        assert equal is not varies_by_step(operand), f"seed {seed}, step {step}"


def test_every_field_of_an_operand_was_tried() -> None:
    """A new field may bring new randomness."""
    for field in dataclasses.fields(Operand):
        assert len({getattr(operand, field.name) for operand in OPERANDS}) > 1, field.name


def test_noise_is_centred_where_transformer_engine_does_not_round() -> None:
    """What it rounds must have its distribution, a bias of 1/512 of a step included."""
    centred = {str(operand) for operand in OPERANDS if operand.centred_noise}
    assert centred == {
        str(Operand(N4, rounding=Rounding.sr_headroom)),
        str(Operand(Format.mxfp4, rounding=Rounding.sr)),
    }
