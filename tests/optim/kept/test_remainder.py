"""An FP32 number is its BF16 rounding and 17 bits: exact for every pattern of either half."""

from __future__ import annotations

import torch

from megatron_fp4.optim.kept.remainder import join, split
from megatron_fp4.optim.kept.stores import RemainderStore


def every_lower_half(upper: int) -> torch.Tensor:
    return ((torch.arange(2**16, dtype=torch.int64) + (upper << 16)).to(torch.int32)).view(torch.float32)


def test_every_lower_half_at_every_exponent_sign_and_parity() -> None:
    for sign in (0, 0x8000):
        for exponent in range(256):
            for mantissa in (0, 1, 0x7E, 0x7F):  # even and odd ties, and the carry into the exponent
                master = every_lower_half(sign | exponent << 7 | mantissa)
                back = join(weight := master.to(torch.bfloat16), *split(master, weight))
                if exponent < 255:
                    assert torch.equal(back.view(torch.int32), master.view(torch.int32)), (sign, exponent, mantissa)
                else:
                    infinite = master.isinf()
                    assert torch.equal(back[infinite], master[infinite])
                    assert torch.equal(back.isnan(), master.isnan())


def test_sixteen_bits_would_not_do() -> None:
    """Both ties beside an even BF16 number round to it, and differ in nothing that 16 bits hold."""
    ties = torch.tensor([0x3F80_8000, 0x3F7F_8000], dtype=torch.int32).view(torch.float32)
    weight = ties.to(torch.bfloat16)
    low, up = split(ties.repeat(4), weight.repeat(4))
    assert weight[0] == weight[1]
    assert low[0] == low[1]
    assert up.tolist() == [0b10101010]


def test_a_stretch_is_read_and_written_at_any_element() -> None:
    weight = torch.randn(256).to(torch.bfloat16)
    store = RemainderStore(weight)
    values = torch.randn(77)
    store.write(64, 64 + 77, values, None)
    assert torch.equal(store.read(64, 141), values)
    assert torch.equal(store.read(69, 90), values[5:26])
    assert torch.equal(weight[64:141], values.to(torch.bfloat16))
    assert torch.equal(store.read(0, 64), weight[:64].float())
