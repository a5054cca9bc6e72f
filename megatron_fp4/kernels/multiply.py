"""The product of two packed operands: which kernel, with which tile."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_fp4.kernels.gemm import gemm_kernel, persistent_gemm_kernel
from megatron_fp4.kernels.values import OPTIONS, Coding, Constants, GemmTile, PackedOperand, Target


def gemm_constants(a: Coding, b: Coding, target: Target, tile: GemmTile) -> Constants:
    """What `gemm_kernel` is compiled for, beside the kind of its output."""
    return {
        "DIVISOR": a.aim * b.aim,
        "SWIZZLED": target.native,
        "FORMAT": "e2m1" if a.bits == 4 else "e4m3",
        "BLOCK": a.block,
        "NATIVE": target.native or a.aim == 0,
        **tile.sizes,
    }


def multiply(
    a: PackedOperand, b: PackedOperand, out: Tensor, *, target: Target, accumulate: bool = False, rounded: bool = False
) -> None:
    """`a [M, K] @ b [N, K].T`, with their global scales, into `out [M, N]`, BF16 or FP32.

    accumulate: add to `out`, FP32, the product, which is rounded to BF16 before if `rounded`.
    """
    (M, N), K = (a.lines, b.lines), a.length
    assert b.length == K
    assert out.is_contiguous()
    to_bf16 = out.dtype == torch.bfloat16
    output = {"ACCUMULATE": accumulate, "ROUND": rounded or to_bf16}
    amaxes = tuple(out if operand.amax is None else operand.amax for operand in (a, b))
    where = out.view(torch.int16) if to_bf16 else out
    tile = target.tile(a.how)
    constants = gemm_constants(a.how, b.how, target, tile)
    tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    if target.persistent and a.how.aim and K % 32 == 0:
        kept = {name: constants[name] for name in ("DIVISOR", "BM", "BN", "BK")}
        persistent_gemm_kernel[(min(tiles, target.programs),)](
            *_descriptors(a, tile.rows, tile.depth), *_descriptors(b, tile.columns, tile.depth), where, *amaxes,
            M, N, K, PROGRAMS=target.programs, STAGES=tile.stages, **kept, **output, **tile.options, **OPTIONS,
        )  # fmt: skip
    else:
        gemm_kernel[(tiles,)](
            a.codes, a.scales, b.codes, b.scales, where, *amaxes, M, N, K,
            **constants, **output, **tile.options, **OPTIONS,
        )  # fmt: skip


def _descriptors(operand: PackedOperand, lines: int, depth: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """TMA descriptors of codes and scales for tiles of `lines` x `depth` elements."""
    scales = operand.scales.view(torch.float8_e4m3fn).view(1, -(-operand.lines // 128), -1, 2, 256)
    return (
        TensorDescriptor.from_tensor(operand.codes, [lines, depth // 2]),
        TensorDescriptor.from_tensor(scales, [1, lines // 128, depth // 64, 2, 256]),
    )
