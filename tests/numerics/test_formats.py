"""Casts against an independent implementation (ml_dtypes), and the two rounding forms against each other."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fp4.numerics import formats, key_of, rounding, uniform


def probes(low: int, high: int) -> Tensor:
    """FP32 numbers of every mantissa prefix of 8 bits between 2^low and 2^high, each with one ulp to both sides."""
    mantissa = 1 + torch.arange(256) / 256
    exact = (mantissa[None] * torch.exp2(torch.arange(low, high).float())[:, None]).flatten()
    near = [exact, torch.nextafter(exact, exact * 2), torch.nextafter(exact, exact / 2)]
    values = torch.cat([*near, torch.zeros(1), torch.tensor([6.0, 448.0, 464.0, 500.0])])
    return torch.cat([values, -values])


def test_e2m1_equals_ml_dtypes() -> None:
    """A difference: a tie or a saturation is not IEEE nearest-even."""
    x = probes(-6, 6)
    x = torch.where(x.abs() > 6, torch.copysign(torch.tensor(6.0), x), x)
    expected = torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    assert torch.equal(formats.decode_e2m1(formats.encode_e2m1(x)), expected)
    assert torch.equal(rounding.round_e2m1(x), expected)


def test_e2m1_saturates() -> None:
    x = torch.tensor([6.1, 7.0, 1e30, -1e30])
    assert rounding.round_e2m1(x).tolist() == [6, 6, 6, -6]
    assert formats.decode_e2m1(formats.encode_e2m1(x)).tolist() == [6, 6, 6, -6]


def test_e4m3_equals_ml_dtypes() -> None:
    """A difference: the arithmetic rounding is wrong at a tie or in the denormals."""
    x = probes(-14, 10).clamp(-448, 448)
    expected = torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
    assert torch.equal(rounding.round_e4m3(x), expected)
    assert torch.equal(formats.encode_e4m3(x).float(), expected)


def test_e8m0_rounds_up() -> None:
    """A difference: a block could saturate (rounded down) or lose a binade (rounded up twice)."""
    x = probes(-126, 126).abs()
    scale = rounding.power_of_two_at_least(x)
    power = torch.exp2(torch.arange(-127, 127).double())
    expected = power[torch.searchsorted(power, x.double())].float()
    assert torch.equal(scale, expected)
    assert torch.equal(formats.encode_e8m0_up(x).float(), expected)
    assert torch.equal(scale * rounding.power_of_two_inverse(scale), torch.ones_like(scale))
    codes = formats.encode_e8m0_up(x).view(torch.uint8).numpy()
    assert np.array_equal(codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32), expected.numpy())


def test_e8m0_at_the_ends_of_its_range() -> None:
    """2^-127 is a denormal of FP32, and its lowest; nothing above 2^126 has an inverse that FP32 holds as a normal."""
    x = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**-127 + 2.0**-149, 2.0**126, torch.finfo(torch.float32).max])
    expected = [2.0**-127, 2.0**-127, 2.0**-127, 2.0**-126, 2.0**126, 2.0**126]
    assert rounding.power_of_two_at_least(x).tolist() == expected


def test_packing() -> None:
    """Even element in the low nibble, as the hardware reads it."""
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)
    assert formats.pack(codes)[0, 0] == 0x10
    assert torch.equal(formats.unpack(formats.pack(codes)), codes)


@pytest.mark.parametrize("bits", [8, 20])
def test_stochastic_rounding_is_unbiased_inside_the_grid(bits: int) -> None:
    """The mean over many draws is x, but for the known -1/2^(bits+1) of a step that finite noise costs."""
    draws = 1 << 16
    x = torch.tensor([0.1, 0.3, 0.77, 1.1, 1.9, 2.2, 3.6, 4.5, 5.9, -0.4, -2.7])
    noise = uniform(key_of("sr"), torch.arange(draws), torch.arange(len(x)))
    noise = torch.floor(noise * 2**bits) / 2**bits
    mean = rounding.round_e2m1(x.expand(draws, -1), noise).double().mean(0)
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0)).double()
    fraction = x.abs().double() / step % 1
    sigma = step * (fraction * (1 - fraction) / draws).sqrt()
    bias = step * torch.ceil(fraction * 2**bits) / 2**bits - step * fraction  # P(noise >= 1 - f) on a grid of 2^-bits
    expected = x.double() + torch.copysign(bias - step / 2**bits * (bias > 0), x.double())
    assert ((mean - expected).abs() < 5 * sigma + 1e-9).all() or ((mean - x).abs() < 5 * sigma + step / 2**bits).all()
    assert set(rounding.round_e2m1(x.expand(draws, -1), noise).abs().unique().tolist()) <= set(formats.E2M1_VALUES)


def test_stochastic_forms_agree() -> None:
    """Arithmetic rounding against comparison with every grid point, at the ends of the noise range too."""
    x = probes(-6, 4)
    for noise in (0.0, 2.0**-20, 0.3, 0.5, 1 - 2.0**-8, 1 - 2.0**-20):
        u = torch.full_like(x, noise)
        spelled_out = formats.decode_e2m1(formats.encode_e2m1_stochastic(x, u))
        assert torch.equal(rounding.round_e2m1(x, u), spelled_out), f"noise {noise}"
