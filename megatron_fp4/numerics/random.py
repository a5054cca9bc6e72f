"""Random numbers that have an address.

A random number is a pure function of (key, row, column), never of "how many were drawn before". The key is hashed from
names and counters (seed, step, tensor name); row and column are *global* indices of a logical tensor. A shard, a
recomputed block and a resumed job therefore see the numbers that the whole, uninterrupted tensor would see.

The mixing is 32-bit integer arithmetic (two multiply-xorshift rounds with the constants of Wellons' `lowbias32`), the
same on every device, eager or compiled. It is not cryptography, and it keeps no state.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _signed(word: int) -> int:
    """A 32-bit pattern as the int32 value that has it (torch has no unsigned arithmetic)."""
    return word - (1 << 32) if word >= 1 << 31 else word


_MULTIPLY_1 = _signed(0x7FEB352D)
_MULTIPLY_2 = _signed(0x846CA68B)
_GOLDEN = _signed(0x9E3779B9)


def key_of(*parts: int | str) -> int:
    """A stable 63-bit key of names and numbers, e.g. `key_of(seed, step, "blocks.3.mlp.up", "dgrad.dy")`.

    The same parts give the same key in every process and version of Python; 1 and "1" are different parts.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _shift(x: Tensor, count: int) -> Tensor:
    """Logical right shift of int32 (`>>` copies the sign)."""
    return (x >> count) & ((1 << (32 - count)) - 1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every input bit flips every output bit about half of the time."""
    x = x ^ _shift(x, 16)
    x = x * _MULTIPLY_1
    x = x ^ _shift(x, 15)
    x = x * _MULTIPLY_2
    return x ^ _shift(x, 16)


Key = int | Tensor
"""What `key_of` returns, or that as an int64 scalar on the device: an argument of a kernel, no constant in it."""


def _low_word(x: Tensor) -> Tensor:
    """The low half of int64, as the int32 that has its bits."""
    return ((x & _WORD) ^ 0x80000000).sub_(0x80000000).to(torch.int32)


def _key_word(key: Key, shift: int, salt: int) -> Key:
    """32 bits of the key, differently salted for each use."""
    if isinstance(key, Tensor):
        return _low_word(key >> shift) ^ _signed(salt)
    return _signed(((key >> shift) & _WORD) ^ salt)


def _hash_index(index: Tensor, key_word: Key) -> Tensor:
    """int64 `[n]` to int32 `[n]`: both halves of the index, mixed with one word of the key."""
    high = (index >> 32).to(torch.int32)
    return _mix(_mix(_low_word(index) ^ key_word) + high * _GOLDEN)


def row_words(key: Key, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What every element of a row shares: two int32 `[R]` (64 bits, so that no two rows of a batch share a stream)."""
    return _hash_index(rows, _key_word(key, 0, 0)), _hash_index(rows, _key_word(key, 32, 0x5BD1E995))


def column_words(key: Key, cols: Tensor) -> Tensor:
    """What every element of a column shares: int32 `[C]`."""
    return _hash_index(cols, _key_word(key, 16, 0x3C6EF372))


def combine(row_a: Tensor, row_b: Tensor, column: Tensor) -> Tensor:
    """The random word of each element, int32, from broadcastable row and column words. Made to be compiled."""
    x = row_a ^ column
    x = x ^ _shift(x, 16)
    x = x * _MULTIPLY_1
    x = (x ^ _shift(x, 15)) + row_b
    x = x * _MULTIPLY_2
    return x ^ _shift(x, 16)


def random_bits(key: int, rows: Tensor, cols: Tensor) -> Tensor:
    """32 random bits per element, int32 `[R, C]`.

    rows: int64 `[R]` global row indices. cols: int64 `[C]` global column indices (same device).
    """
    row_a, row_b = row_words(key, rows)
    return combine(row_a[:, None], row_b[:, None], column_words(key, cols)[None, :])


def uniform(key: int, rows: Tensor, cols: Tensor) -> Tensor:
    """float32 `[R, C]` in [0, 1): multiples of 2^-24."""
    return _shift(random_bits(key, rows, cols), 8).to(torch.float32) * 2.0**-24


def normal(key: int, rows: Tensor, cols: Tensor) -> Tensor:
    """Standard normal float32 `[R, C]`, by the inverse distribution function of a 32-bit uniform (|z| < 6.4).

    Evaluated in float64 and rounded once, so that an element has one value wherever it lies in a buffer.
    """
    centre = random_bits(key, rows, cols).to(torch.float64) + (2.0**31 + 0.5)
    return torch.special.ndtri(centre * 2.0**-32).to(torch.float32)
