"""The emulation with its fp8_block GEMMs on FP8 tensor cores: the paper's FP8 baseline on a Hopper GPU.

Quantization stays the emulated backend's, so codes and scales are the same bits; they are only kept apart, as
`torch.nn.functional.scaled_mm` wants them, instead of being multiplied out to BF16. What differs is the order of sums
inside the GEMM. torch 2.13 has block scaling for compute capability 9.x with CUDA 12.9 or newer only
(aten/src/ATen/native/cuda/ScaledBlas.cpp, `_check_deepseek_support`); everything else is refused at construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from megatron_fp4.numerics.stages import BlockScales
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from megatron_fp4.precision.backends.finite import NonFiniteWatch, reduce_and_check
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin, QuantizedOperand, check_shape
from megatron_fp4.precision.config import GEMMS, ComputeDtype, PrecisionConfig
from megatron_fp4.precision.operand import Format
from megatron_fp4.precision.spec import Gemm

Tile = tuple[int, int]
RECIPES = {(1, 128): ScalingType.BlockWise1x128, (128, 128): ScalingType.BlockWise128x128}
REMEDY = "; use precision.backend=emulated, which multiplies the same operands in BF16"


@dataclass(frozen=True, eq=False)
class _Codes(QuantizedOperand):
    """tensors = (codes, scales) of an operand `[M, K]`: float8_e4m3fn, contiguous; FP32 in the layout of `_scales`."""

    tile: Tile


class NativeFp8Backend:
    """See `Backend`. GEMMs in high precision are the emulated backend's.

    compile: fuse the quantizer with torch.compile. Raises ValueError with the remedy for a recipe, GPU or CUDA version
    that `scaled_mm` does not take.
    """

    def __init__(self, config: PrecisionConfig, watch: NonFiniteWatch | None = None) -> None:
        check_native_recipes(config)
        _check_gpu()
        self._emulated = EmulatedBackend(config.compile, watch)
        self._watch = watch

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`. Deferred copies are made at once: codes are half as large as the tensor."""
        quantized = [copy for copy in copies if copy.operand.quantized]
        for copy in quantized:
            check_shape(x, origin, copy)
            _check_multiple(x, origin, copy)
        passes = self._emulated.passes
        maxima = {tile: passes.block_maxima(x, tile) for tile in {copy.stored_tile for copy in quantized}}
        amaxes = [passes.amax(maxima[copy.stored_tile]) for copy in quantized]
        reduce_and_check(amaxes, origin, quantized, self._watch)
        codes = {tile: self._codes(x, block_maxima, tile) for tile, block_maxima in maxima.items()}
        return tuple(
            _oriented(*codes[copy.stored_tile], copy)
            if copy.operand.quantized
            else self._emulated.quantize(x, origin, [copy])[0]
            for copy in copies
        )

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`. `scaled_mm` does not accumulate, so a sum is a pass of its own."""
        if not isinstance(a, _Codes) or not isinstance(b, _Codes):
            return self._emulated.matmul(a, b, out_dtype=out_dtype, accumulate_into=accumulate_into)
        (left, left_scale), (right, right_scale) = a.tensors, b.tensors
        recipes = RECIPES[a.tile], RECIPES[b.tile]
        out = scaled_mm(left, right.T, left_scale, recipes[0], right_scale, recipes[1], output_dtype=out_dtype)
        return out if accumulate_into is None else accumulate_into.add_(out)

    def _codes(self, x: Tensor, block_maxima: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
        """(codes in x's shape, scale of each tile), from the emulated backend's own passes."""
        passes = self._emulated.passes
        scale, multiplier = passes.power_of_two_scales(block_maxima, "e4m3")
        one = BlockScales(torch.ones_like(scale), multiplier)  # code * 1
        return passes.rounded(x, one, tile=tile, element="e4m3", dtype=torch.float8_e4m3fn), scale


def _oriented(codes: Tensor, scale: Tensor, copy: Copy) -> _Codes:
    """The copy as an operand `[M, K]`: a GEMM on Hopper takes both operands with K contiguous."""
    assert copy.operand.tile is not None
    if copy.along == 0:
        codes, scale = codes.T, scale.T
    return _Codes((codes.contiguous(), _scales(scale, copy.operand.tile)), copy.operand.tile)


def _scales(scale: Tensor, tile: Tile) -> Tensor:
    """`[M/r, K/128]` as `scaled_mm` wants it: 1x128 as it is, with stride (1, M); 128x128 transposed, K/128 padded to a
    multiple of 4, `[K4, M/128]` with stride (1, K4)."""
    if tile == (1, 128):
        return scale.T.contiguous().T
    return F.pad(scale, (0, -scale.shape[1] % 4)).contiguous().T


def _check_multiple(x: Tensor, origin: OperandOrigin, copy: Copy) -> None:
    for size in x.shape:
        if size % 16:
            raise ValueError(
                f"{origin.name}: operand {origin.operand} of {copy.gemm} has local shape {tuple(x.shape)}; FP8 tensor"
                f" cores need multiples of 16, got {size}; change the sizes or the parallel layout{REMEDY}"
            )


def check_native_recipes(config: PrecisionConfig) -> None:
    if config.compute_dtype is not ComputeDtype.bf16:
        raise ValueError(
            f"precision.backend=native_fp8 with precision.compute_dtype={config.compute_dtype.name}: FP8 tensor cores"
            f" do not make the exact sums of the proof mode{REMEDY}"
        )
    gemms = [(name, gemm, getattr(recipe, gemm)) for name, recipe in config.recipes.items() for gemm in GEMMS]
    for name, gemm_name, gemm in gemms:
        if gemm.quantized and (reason := _objection(gemm)):
            raise ValueError(f"precision recipe {name}, {gemm_name}: {reason} (precision.backend=native_fp8){REMEDY}")
    if not any(gemm.quantized for _, _, gemm in gemms):
        raise ValueError(f"precision.backend=native_fp8 has no effect: no recipe has an fp8_block GEMM{REMEDY}")


def _objection(gemm: Gemm) -> str:
    first, second = gemm.operands
    formats = {first.format, second.format}
    if formats != {Format.fp8_block}:
        names = " and ".join(sorted(fmt.name for fmt in formats))
        return f"operands in {names}, but only GEMMs of two fp8_block operands run on its tensor cores"
    if first.tile == second.tile == (128, 128):
        return "two operands in 128x128 tiles, which scaled_mm does not take; use 1x128 tiles for one of them"
    if first.center or second.center:
        return "center, whose correction its FP8 GEMMs do not make; leave it out"
    if first.rht_size:
        return "a Hadamard transform, which its quantizer does not make; use rht_size: 0"
    return ""


def _check_gpu() -> None:
    if not torch.cuda.is_available():
        raise ValueError(f"precision.backend=native_fp8 needs a Hopper GPU, and torch sees no CUDA device{REMEDY}")
    major, minor = torch.cuda.get_device_capability()
    if major != 9:
        raise ValueError(
            f"precision.backend=native_fp8 needs a GPU of compute capability 9.x (Hopper): torch {torch.__version__}"
            f" has FP8 block scaling for no other, and this one has {major}.{minor}{REMEDY}"
        )
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if cuda < (12, 9):
        raise ValueError(
            f"precision.backend=native_fp8 needs a torch built for CUDA 12.9 or newer, this one is for"
            f" {torch.version.cuda}{REMEDY}"
        )
