"""Device code of the tests: the elementary functions on a vector, and faults to plant."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fp4.kernels.arithmetic import as_bits, as_float, bf16_bits, e2m1_code, e4m3_code, magnitude, sign_code


@triton.jit
def encode(x_ptr, e4m3_ptr, e2m1_ptr, bf16_ptr, N: tl.constexpr, INSTRUCTION: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(e4m3_ptr + at, e4m3_code(tl.abs(x)))
    tl.store(e2m1_ptr + at, e2m1_code(x, INSTRUCTION))
    tl.store(bf16_ptr + at, bf16_bits(x))


@triton.jit
def half_up_code(q, INSTRUCTION: tl.constexpr):
    clipped = tl.minimum(as_float(magnitude(q)), 6.0)
    normal = ((as_bits(clipped) + 0x200000) >> 22) - (126 << 1)
    small = as_bits(clipped + 4194304.0) & 7
    return tl.where(clipped < 1.0, small, normal) | sign_code(q, 28)


@triton.jit
def truncated_scale(t):
    bits = as_bits(tl.minimum(t, 448.0))
    return tl.where(t < 0.015625, as_bits(t + 16384.0) & 0xF, (bits >> 20) - (120 << 3))


@triton.jit
def weak_mix(x):
    return x ^ (x >> 15)


# What the interpreter gets wrong, one each.


@triton.jit
def rounded_to_bf16(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


@triton.jit
def rounded_to_e4m3(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.float8e4nv))


@triton.jit
def widened(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.float32))


@triton.jit
def multiplied(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at[:, None] * N + at[None, :])
    tl.store(out_ptr + at[:, None] * N + at[None, :], tl.dot(x, x))
