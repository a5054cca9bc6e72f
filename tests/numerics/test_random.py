"""Addressed random numbers: a pure function of (key, row, column), and random enough."""

from __future__ import annotations

import pytest
import torch

from megatron_fp4.numerics import key_of, normal, random_bits, uniform
from megatron_fp4.numerics.stages import address_words


def test_keys_are_stable_and_distinct() -> None:
    """The first value is pinned: if it changes, old runs cannot be repeated."""
    assert key_of(1, 2, "a") == key_of(1, 2, "a") < 2**63
    assert len({key_of(1, 2), key_of("1", 2), key_of(12), key_of("1", "2"), key_of(2, 1)}) == 5
    assert key_of(1234, 7, "blocks.3.mlp.up", "dgrad.dy") == 168340560455850834


@pytest.mark.parametrize("make", [random_bits, uniform, normal])
def test_a_slice_is_the_slice_of_the_whole(make) -> None:  # type: ignore[no-untyped-def]
    """If not, a shard or another micro-batch size changes the numbers (also by vectorization at odd offsets)."""
    key, rows, cols = key_of("x"), torch.arange(300), torch.arange(517)
    whole = make(key, rows, cols)
    assert torch.equal(make(key, rows[17:91], cols[13:400]), whole[17:91, 13:400])
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make(key, rows[shuffled], cols), whole[shuffled])


def test_large_indices_matter() -> None:
    """Both halves of a 64-bit row index count; otherwise token 0 and token 2^32 would share their noise."""
    cols = torch.arange(64)
    rows = torch.tensor([0, 1 << 32, 1 << 40, (1 << 32) + 1])
    bits = random_bits(key_of(0), rows, cols)
    assert len({tuple(row.tolist()) for row in bits}) == 4


def test_bits_are_balanced_and_independent() -> None:
    """Within 5 standard deviations: every bit half set; neighbours in rows, columns and keys uncorrelated."""
    rows, cols = torch.arange(1024), torch.arange(1024)
    bits = random_bits(key_of(5), rows, cols)
    for bit in range(32):
        share = ((bits >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / 1024, f"bit {bit} is set in {share}"
    u = uniform(key_of(5), rows, cols).double() - 0.5
    v = uniform(key_of(6), rows, cols).double() - 0.5
    for name, a, b in (("rows", u[1:], u[:-1]), ("columns", u[:, 1:], u[:, :-1]), ("keys", u, v)):
        assert abs((a * b).mean().item() * 12) < 5 / 1024, f"neighbouring {name} are correlated"


def test_moments() -> None:
    rows, cols = torch.arange(1024), torch.arange(1024)
    u, z = uniform(key_of(8), rows, cols).double(), normal(key_of(8), rows, cols).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 1024
    assert abs(z.mean()) < 5 / 1024
    assert abs(z.std() - 1) < 5 / 2**0.5 / 1024
    assert abs((z**4).mean() - 3) < 5 * 96**0.5 / 1024
    assert z.abs().max() < 6.5


def test_a_key_on_the_device_addresses_the_same_numbers() -> None:
    """As an argument of a compiled kernel; both halves of the key and of the index count."""
    rows, columns = torch.tensor([0, 5, 2**31, 2**40 + 3]), torch.arange(7) + 2**33
    for number in range(50):
        key = key_of(number, "layer")
        expected = address_words(key, rows, columns)
        words = address_words(torch.tensor(key), rows, columns)
        assert all(torch.equal(*pair) for pair in zip(words, expected, strict=True))
