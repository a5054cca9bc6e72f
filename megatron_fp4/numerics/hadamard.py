"""The random Hadamard transform (RHT): spreads an outlier over its group before a block format sees it.

y = (x * signs) @ H / sqrt(n) for consecutive groups of n elements along one dimension. H is orthogonal, so transforming
both operands of a GEMM along the contraction leaves the product unchanged (paper section 4.2). The sum is made by
butterflies in FP32, whose order depends on nothing but n, and is rounded once to the type of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.numerics.random import key_of, random_bits

# The 16 signs that Transformer Engine and torchtitan use for all layers and steps.
SIGNS_16 = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_NEGATIVE_16 = sum(1 << place for place, sign in enumerate(SIGNS_16) if sign < 0)


def fixed_signs(size: int, device: torch.device | str = "cpu") -> Tensor:
    """FP32 `[size]` of +-1: Transformer Engine's vector for 16, otherwise one derived from the size alone."""
    if size == 16:
        negative = torch.bitwise_right_shift(_NEGATIVE_16, torch.arange(16, device=device)) & 1
        return 1.0 - 2.0 * negative.to(torch.float32)  # computed there: a list would be copied there
    return signs_from_key(key_of("rht_signs", size), size, device)


def signs_from_key(key: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """FP32 `[size]` of +-1 that depends on (key, size) only."""
    index = torch.arange(size, device=device)
    return 1.0 - 2.0 * (random_bits(key, index[:1], index)[0] & 1).to(torch.float32)


def hadamard_lanes(grouped: Tensor, signs: Tensor, size: int) -> Tensor:
    """Transform `[groups, size, ...]` along dimension 1; same shape and dtype. Made to be compiled."""
    lanes = [lane.to(torch.float32) * signs[i] for i, lane in enumerate(grouped.unbind(1))]
    half = 1
    while half < size:
        for start in range(0, size, 2 * half):
            for i in range(start, start + half):
                lanes[i], lanes[i + half] = lanes[i] + lanes[i + half], lanes[i] - lanes[i + half]
        half *= 2
    scale = size**-0.5  # exact for 4, 16, 64; one rounding of each element otherwise
    return torch.stack([(lane * scale).to(grouped.dtype) for lane in lanes], 1)


def hadamard(x: Tensor, size: int, signs: Tensor | None, dim: int) -> Tensor:
    """Transform a 2-D tensor along `dim` in consecutive groups of `size` (a power of two); same shape and dtype.

    signs: FP32 `[size]`, or None for no signs. The shape of `x` must be a multiple of `size` along `dim`.
    """
    shape = (x.shape[0] // size, size, x.shape[1]) if dim == 0 else (x.numel() // size, size)
    signs = torch.ones(size, device=x.device) if signs is None else signs
    return hadamard_lanes(x.contiguous().view(shape), signs, size).view(x.shape)


def random_hadamard(x: Tensor, *, size: int = 16, signs: Tensor | str | None = "fixed") -> Tensor:
    """Random Hadamard transform of `x [..., D]` along its last dimension, in groups of `size`.

    signs: "fixed" (see `fixed_signs`), None, or an FP32 tensor `[size]` of +-1. Result: shape and dtype of `x`.
    Raises ValueError if D is not a multiple of `size`, or `size` is not a power of two.
    """
    if size < 2 or size & (size - 1):
        raise ValueError(f"Hadamard size {size} is not a power of two of at least 2")
    if x.shape[-1] % size:
        raise ValueError(f"last dimension {x.shape[-1]} is not a multiple of the Hadamard size {size}")
    if isinstance(signs, str):
        if signs != "fixed":
            raise ValueError(f"signs={signs!r}; use 'fixed', None or a tensor of +-1")
        signs = fixed_signs(size, x.device)
    return hadamard(x.reshape(-1, x.shape[-1]), size, signs, dim=1).view(x.shape)
