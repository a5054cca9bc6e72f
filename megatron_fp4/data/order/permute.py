"""Shuffling without a table: a keyed bijection of range(size), evaluated only where it is asked for.

Multiply-add and xor-shift are both invertible modulo 2^bits, so a few keyed rounds of them permute
range(2^bits); values that land outside range(size) are sent round again until they land inside (cycle walking).
Integer arithmetic only, so the order of a run does not depend on a NumPy version (`numpy.random.Generator` gives no
such promise) and a billion samples need no memory. It is a shuffle, not a cipher.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4
_CHUNK = 1 << 16  # elements worked on at a time: the temporaries stay in the second-level cache


def digest(*parts: object) -> bytes:
    """64 bytes that depend on every part, with its type and its place (blake2b)."""
    return hashlib.blake2b(repr(parts).encode()).digest()


def permute(key: bytes, size: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places of `index` [n] under the permutation of range(size) named by `key` (64 bytes, see `digest`)."""
    if size < 2:
        return np.zeros(len(index), np.int64)
    # At least 6 bits: on fewer, the rounds can reach only a handful of the orders of a very small set.
    bits = max(6, (size - 1).bit_length())
    out = np.empty(len(index), np.int64)
    for start in range(0, len(index), _CHUNK):
        part = _rounds(key, bits, index[start : start + _CHUNK].astype(np.uint64))
        outside = np.flatnonzero(part >= size)
        while len(outside):
            moved = _rounds(key, bits, part[outside])
            part[outside] = moved
            outside = outside[moved >= size]
        out[start : start + _CHUNK] = part
    return out


def _rounds(key: bytes, bits: int, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = np.frombuffer(key, "<u8")
    mask, shift = np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)
    scratch = np.empty_like(x)
    for r in range(_ROUNDS):
        x = np.multiply(x, words[2 * r] | np.uint64(1))  # odd, hence invertible
        x += words[2 * r + 1]
        x &= mask
        np.right_shift(x, shift, out=scratch)
        x ^= scratch
    return x
