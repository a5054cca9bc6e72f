"""The random Hadamard transform against its matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fp4.numerics import key_of, random_hadamard
from megatron_fp4.numerics.hadamard import SIGNS_16, fixed_signs, hadamard, signs_from_key


def matrix(size: int, signs: Tensor) -> Tensor:
    """diag(signs) H / sqrt(size), FP64, Sylvester's construction."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return signs.double()[:, None] * h / size**0.5


@pytest.mark.parametrize("size", [4, 16, 32, 64, 128])
def test_equals_the_matrix_product(size: int) -> None:
    """A difference: a butterfly is wired wrongly, or the signs sit on the wrong side."""
    x = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    expected = (x.double().view(24, -1, size) @ matrix(size, fixed_signs(size))).view(24, 256)
    assert torch.allclose(random_hadamard(x, size=size).double(), expected, atol=2e-6)
    along_rows = hadamard(x.T.contiguous(), size, fixed_signs(size), dim=0)
    assert torch.equal(along_rows.T, random_hadamard(x, size=size))


def test_bf16_is_rounded_once() -> None:
    """FP32 sums rounded once to BF16; two roundings would be seen in many elements."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = (x.double().view(256, -1, 16) @ matrix(16, torch.tensor(SIGNS_16))).view(256, 256)
    assert torch.equal(random_hadamard(x), exact.float().bfloat16())


@given(st.sampled_from([4, 16, 32, 64, 128]), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_orthogonal(size: int, seed: int) -> None:
    """The product of two transformed matrices is that of the matrices: the transform cancels in Wgrad."""
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.randn(8, 128, generator=gen), torch.randn(8, 128, generator=gen)
    signs = signs_from_key(key_of("step", seed), size)
    turned = [random_hadamard(x, size=size, signs=signs).double() for x in (a, b)]
    assert torch.allclose(turned[0] @ turned[1].T, a.double() @ b.double().T, atol=1e-4)
    assert torch.allclose(turned[0].norm(dim=1), a.double().norm(dim=1), rtol=1e-6), "lengths are kept"


def test_signs() -> None:
    assert set(signs_from_key(key_of(1), 64).tolist()) == {1.0, -1.0}
    assert not torch.equal(signs_from_key(key_of(1), 64), signs_from_key(key_of(2), 64))
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(random_hadamard(x, signs=None), random_hadamard(x, signs=torch.ones(16)))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="24 is not a multiple of the Hadamard size 16"):
        random_hadamard(torch.zeros(2, 24))
    with pytest.raises(ValueError, match="power of two"):
        random_hadamard(torch.zeros(2, 24), size=12)


def test_the_16_signs_are_computed_on_the_device() -> None:
    assert fixed_signs(16).tolist() == list(SIGNS_16)
    assert fixed_signs(16, "meta").is_meta, "a list is copied from the host, at which the device waits"
