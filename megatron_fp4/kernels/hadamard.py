"""Lanes: a block as a tuple of tensors, one per element, and the random Hadamard transform across them in registers.

The transform is not a dot on tensor cores: their sum of 16 products has no defined order or width. Butterflies in FP32
have the order of numerics/hadamard.py and cost four additions an element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fp4.kernels.arithmetic import as_float, bf16_bits, load_float, magnitude


@triton.jit
def load_lanes(x_ptr, group, line, M, K, ALONG: tl.constexpr, LANES: tl.constexpr):
    """LANES FP32 tensors `[G, L]`: elements group * LANES + i of the contraction of each line.

    ALONG: 0 if x is `[K, M]`, 1 if it is `[M, K]`.
    """
    inside = (group[:, None] * LANES < K) & (line[None, :] < M)
    first = group[:, None].to(tl.int64) * LANES
    lanes = ()
    for i in tl.static_range(LANES):
        if ALONG == 0:
            at = (first + i) * M + line[None, :]
        else:
            at = line[None, :].to(tl.int64) * K + first + i
        lanes = lanes + (load_float(x_ptr + at, inside),)
    return lanes


@triton.jit
def lanes_amax(lanes, LANES: tl.constexpr):
    """The largest magnitude of each block as bits, `[G, L]`."""
    largest = magnitude(lanes[0])
    for i in tl.static_range(1, LANES):
        largest = tl.maximum(largest, magnitude(lanes[i]))
    return largest


@triton.jit
def butterflies(lanes, HALF: tl.constexpr, LANES: tl.constexpr):
    """One stage: sums and differences of lanes that are HALF apart."""
    out = ()
    for i in tl.static_range(LANES):
        if (i // HALF) % 2 == 0:
            out = out + (lanes[i] + lanes[i + HALF],)
        else:
            out = out + (lanes[i - HALF] - lanes[i],)
    return out


@triton.jit
def hadamard(lanes, signs, RHT: tl.constexpr, LANES: tl.constexpr, ROUNDS: tl.constexpr):
    """`hadamard.hadamard_lanes` in groups of RHT lanes; signs: bit i is set where lane i of a group is negated.

    ROUNDS: round to BF16, the type of x.
    """
    x = ()
    for i in tl.static_range(LANES):
        x = x + (lanes[i] * (1 - 2 * ((signs >> (i % RHT)) & 1)).to(tl.float32),)
    if RHT > 1:
        x = butterflies(x, 1, LANES)
    if RHT > 2:
        x = butterflies(x, 2, LANES)
    if RHT > 4:
        x = butterflies(x, 4, LANES)
    if RHT > 8:
        x = butterflies(x, 8, LANES)
    if RHT > 16:
        x = butterflies(x, 16, LANES)
    out = ()
    for i in tl.static_range(LANES):
        value = x[i] * (RHT**-0.5)
        out = out + ((as_float(bf16_bits(value)) if ROUNDS else value),)
    return out
