"""What decides bits, one device function each: every operation is an integer's or an IEEE one.

The rules that make an interpreter on a CPU and every GPU agree: no value is ever held in BF16 (tensors are loaded and
stored as bits); maxima are integer maxima of |x|'s bits, where NaN > Inf > all numbers; every division is `div_rn`; no
libdevice function; kernels are launched with `enable_fp_fusion=False`, because `c + a * b` would become one operation.

The definitions are numerics/stages.py, rounding.py and random.py. Types: FP32 unless a name says bits, code or word.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_fp4.kernels import values

FLT_MAX = tl.constexpr(3.4028234663852886e38)
SIXTH = tl.constexpr(1.0 / 6.0)
HEADROOM = tl.constexpr(17.0 / 16.0)
INTERPRETED = tl.constexpr(values.INTERPRETED)
ROUND_TO_BF16 = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, 0f00000000;")
"""The upper half of the result is $1 in BF16: the bits of the rounded FP32 number, in one instruction."""
TO_E2M1 = tl.constexpr("{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, 0f00000000, $1; cvt.u32.u8 $0, pair; }")
"""The code of $1, nearest even and saturating, in the lower half of a byte; from compute capability 10 on."""


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def magnitude(x):
    """|x| as bits, int32."""
    return as_bits(x) & 0x7FFFFFFF


@triton.jit
def load_float(pointer, mask):
    """FP32 values of BF16 numbers (int16 bits) or FP32 ones (int32 bits); 0 outside the mask."""
    bits = tl.load(pointer, mask=mask, other=0)
    if pointer.dtype.element_ty == tl.int16:
        bits = bits.to(tl.int32) << 16
    return as_float(bits)


@triton.jit
def bf16_bits(x):
    """x rounded to BF16, nearest even, as the bits (int32) of the FP32 number."""
    if INTERPRETED:  # inline assembly cannot be interpreted
        bits = as_bits(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits, rounded)  # the carry of a NaN may reach its sign
    return tl.inline_asm_elementwise(ROUND_TO_BF16, "=r,f", [x], tl.int32, True, 1)


@triton.jit
def to_bf16(x):
    """x rounded to BF16, nearest even, as int16 bits to be stored."""
    if INTERPRETED:
        return (bf16_bits(x) >> 16).to(tl.int16)
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def encode_scale(amax, AIM: tl.constexpr):
    """`stages.encode_scale`: S_enc = AIM / amax and 1 / S_enc."""
    encode = tl.minimum(tl.div_rn(tl.zeros_like(amax) + AIM, amax), FLT_MAX)
    encode = tl.where((amax == 0.0) | (encode == 0.0), 1.0, encode)
    return encode, tl.div_rn(tl.zeros_like(amax) + 1.0, encode)


@triton.jit
def e4m3_code(t):
    """Code, int32, of the E4M3 number nearest to t >= 0: ties to even, saturating."""
    t = tl.minimum(t, 448.0)
    bits = as_bits(t)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = as_bits(t + 16384.0) & 0xF  # the sum's last bit is 2^-9, the spacing below 2^-6
    return tl.where(t < 0.015625, small, normal)


@triton.jit
def e4m3_value(code):
    small = code.to(tl.float32) * 0.001953125
    return tl.where(code < 8, small, as_float((code << 20) + (120 << 23)))


@triton.jit
def block_encode(code, decode):
    """`stages.block_encode`: 1 / (scale * S_dec) of an E4M3 scale's code."""
    product = e4m3_value(code) * decode
    return tl.minimum(tl.div_rn(tl.zeros_like(product) + 1.0, product), FLT_MAX)


@triton.jit
def e4m3_scale(largest_bits, amax, AIM: tl.constexpr, PAPER_ORDER: tl.constexpr, WIDER: tl.constexpr):
    """`stages.nvfp4_scales`: code of the scale of a block with this maximum, and its multiplier.

    PAPER_ORDER: (max / 6) * S_enc instead of max * (S_enc / 6). WIDER: allow for the block scale's rounding.
    """
    encode, decode = encode_scale(amax, AIM)
    largest = as_float(largest_bits)
    if PAPER_ORDER:
        target = tl.div_rn(largest, tl.zeros_like(largest) + 6.0) * encode
    else:
        target = largest * (encode * SIXTH)
    if WIDER:
        target = target * HEADROOM
    code = e4m3_code(target)
    return code, block_encode(code, decode)


@triton.jit
def e8m0_scale(largest_bits, ELEMENT_MAX: tl.constexpr):
    """`stages.power_scales`: code of the power of two that is not below max / ELEMENT_MAX, and its exact inverse."""
    largest = as_float(largest_bits)
    bits = as_bits(tl.div_rn(largest, tl.zeros_like(largest) + ELEMENT_MAX))
    code = tl.where(bits <= 0x00400000, 0, tl.minimum((bits + 0x007FFFFF) >> 23, 253))
    return code, as_float((254 - code) << 23)


@triton.jit
def sign_code(q, SHIFT: tl.constexpr):
    """The sign bit of q, moved down by SHIFT."""
    return (as_bits(q) >> SHIFT) & (1 << (31 - SHIFT))


@triton.jit
def e2m1_code(q, INSTRUCTION: tl.constexpr):
    """`formats.encode_e2m1`: code, int32, nearest to q: ties to even, saturating.

    INSTRUCTION: by the one that Blackwell has, which saves a quarter of a quantizer's instructions. It differs for NaN
    alone (+6, here 6 with its sign), and a tensor with one has been seen by its amax.
    """
    if INSTRUCTION:
        return tl.inline_asm_elementwise(TO_E2M1, "=r,f", [q], tl.int32, True, 1)
    clipped = tl.minimum(as_float(magnitude(q)), 6.0)
    bits = as_bits(clipped)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    small = as_bits(clipped + 4194304.0) & 7  # the sum's last bit is 1/2
    return tl.where(clipped < 1.0, small, normal) | sign_code(q, 28)


@triton.jit
def e2m1_code_stochastic(q, noise):
    """`formats.encode_e2m1_stochastic`: code, int32. noise: u in [0, 1) as the integer u * 2^22.

    From 1 up, E2M1 drops 22 bits of the mantissa, to which the noise is added. Below, floor(2|q| + u) is taken; the
    FP32 rounding of that sum belongs to the definition.
    """
    clipped = tl.minimum(as_float(magnitude(q)), 6.0)
    normal = ((as_bits(clipped) + noise) >> 22) - (126 << 1)
    moved = clipped * 2.0 + (as_float((noise << 1) | 0x3F800000) - 1.0)
    small = tl.where(moved >= 2.0, 2, (moved >= 1.0).to(tl.int32))
    return tl.where(clipped < 1.0, small, normal) | sign_code(q, 28)


@triton.jit
def e2m1_rounded(q):
    """`rounding.round_e2m1`: the value nearest to q."""
    clipped = tl.minimum(tl.maximum(q, -6.0), 6.0)
    size = tl.abs(clipped)
    shift = tl.where(size < 2.0, 6291456.0, tl.where(size < 4.0, 12582912.0, 25165824.0))
    return (clipped + shift) - shift


@triton.jit
def mix(x):
    """`random._mix`; uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hash_index(index, key_word):
    """`random._hash_index`. index: int64; key_word: int32 scalar, signed so that its type never changes."""
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    return mix(mix(low ^ key_word.to(tl.uint32)) + high * 0x9E3779B9)


@triton.jit
def load_words(pointer, index, mask):
    return tl.load(pointer + index, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def noise_of(row_a, row_b, column, BITS: tl.constexpr, CENTRED: tl.constexpr):
    """`stages.Noise` of each element as the integer u * 2^22, from broadcastable words of its row and column."""
    x = row_a ^ column
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = (x ^ (x >> 15)) + row_b
    x = x * 0x846CA68B
    if BITS > 16:  # the last shift of `random.combine` leaves the upper 16 bits alone
        x = x ^ (x >> 16)
    noise = (x >> (32 - BITS)).to(tl.int32, bitcast=True) << (22 - BITS)
    if CENTRED:
        noise = noise | (1 << (21 - BITS))
    return noise


@triton.jit
def scale_offset(line, block, blocks, SWIZZLED: tl.constexpr):
    """Where the scale of a block of a line lies: row-major, or in the 128x4 layout of tensor cores (layout.py)."""
    if SWIZZLED:
        tile = (line // 128) * tl.cdiv(blocks, 4) + block // 4
        return tile * 512 + (line % 32) * 16 + (line % 128) // 32 * 4 + block % 4
    return line * blocks + block
