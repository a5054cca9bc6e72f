"""Block-scaled tensors, spelled out: codes and scales as hardware would hold them.

This is the oracle: each line is a line of docs/numerics.md (paper appendix B; Transformer Engine 2.14 and later);
nothing is fused or approximated. `fused` goes to the same operands in few passes and is tested against this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.numerics import formats
from megatron_fp4.numerics.eden import LEAST_SCALE, SCALE_BITS

FLT_MAX = torch.finfo(torch.float32).max
HEADROOM = 17.0 / 16.0


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor `[R, C]` in blocks along its last dimension.

    codes: uint8 `[R, C/2]`, two E2M1 codes per byte, even element in the low nibble; or float8_e4m3fn `[R, C]`.
    scales: `[R, C/block]`, float8_e4m3fn (nvfp4) or float8_e8m0fnu; a 2-D tile repeats its scale in each of its rows.
    amax: FP32 scalar (or `[R, 1]`, `[R, C/block]`): the global scale is amax / divisor; None in formats without one.
    """

    codes: Tensor
    scales: Tensor
    amax: Tensor | None
    divisor: float = 1.0

    def operand(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """code * block_scale `[R, C]`, without the global scale: exact in BF16."""
        codes = self.codes
        values = formats.decode_e2m1(formats.unpack(codes)) if codes.dtype == torch.uint8 else codes.float()
        blocked = values.view(values.shape[0], self.scales.shape[1], -1)
        return (blocked * self.scales.float()[..., None]).view(values.shape).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values `[R, C]` that the codes stand for, rounded once to `dtype`."""
        values = self.operand(torch.float32)
        if self.amax is not None:
            amax = self.amax
            if amax.dim() and amax.shape[1] > 1:
                amax = amax.repeat_interleave(values.shape[1] // amax.shape[1], 1)
            values = values.double() * amax.double() / self.divisor
        return values.to(dtype)


@dataclass(frozen=True, eq=False)
class Eden:
    """How MS-EDEN corrects the block scales. group: elements of a group of the transform. word: random int32 of each
    block, `[R, C/16]`."""

    group: int
    word: Tensor


def quantize_nvfp4(
    x: Tensor,
    *,
    tile: tuple[int, int] = (1, 16),
    amax: Tensor | None = None,
    scale_order: str = "te",
    noise: Tensor | None = None,
    headroom: bool = False,
    four_over_six: str = "off",
    bound: float = formats.E4M3_MAX,
    eden: Eden | None = None,
) -> QuantizedTensor:
    """NVFP4: E2M1 codes, one E4M3 scale per tile, one FP32 scale per tensor.

    x: `[R, C]` BF16 or FP32. tile: (1, 16) or (16, 16). amax: FP32 scalar, default max |x| (or `[R, 1]`, one per row;
    or `[R, C/16]`, one per block).
    scale_order: "te" or "paper". noise: FP32 `[R, C]` in [0, 1) for stochastic rounding, None for nearest even.
    headroom: enlarge the block scales by 17/16. four_over_six: "off", "mae" or "mse". bound: largest block scale.
    eden: the scales take up what nearest codes have lost; x is behind a random transform.
    Raises ValueError if the tile does not divide the shape, or x is not finite and no amax was given.
    """
    _check(x, tile)
    if amax is None:  # whoever has measured it has looked at it, too
        amax = x.abs().amax().float()
        if not bool(torch.isfinite(amax)):
            raise ValueError("quantize_nvfp4: the tensor contains NaN or Inf")
    # S_enc = 2688 / amax, divided as tensors: PyTorch's `2688.0 / amax` multiplies by a reciprocal.
    global_encode = torch.clamp(torch.full_like(amax, formats.E2M1_MAX * bound) / amax, max=FLT_MAX)
    global_encode = torch.where(amax == 0, 1.0, global_encode)
    global_decode = torch.ones_like(amax) / global_encode
    block_max = _tile_amax(x, tile)
    if scale_order == "te" and four_over_six == "off":
        target = block_max * (global_encode * (1.0 / 6.0))
    else:
        target = block_max / torch.full_like(block_max, 6.0) * global_encode
    if headroom:
        target = target * HEADROOM
    values = x.float().view(x.shape[0], -1, tile[1])
    scales = _kept_scales(target, block_max, eden)
    if four_over_six != "off":
        wider = _kept_scales(target * 1.5, block_max, eden)
        divisor = formats.E2M1_MAX * bound
        errors = [_error(values, s, global_decode, amax, divisor, four_over_six, tile) for s in (scales, wider)]
        scales = torch.where(errors[1] < errors[0], wider.float(), scales.float()).to(torch.float8_e4m3fn)
    scaled = (values * _block_encode(scales, global_decode)[..., None]).view(x.shape)
    codes = formats.encode_e2m1(scaled) if noise is None else formats.encode_e2m1_stochastic(scaled, noise)
    if eden is not None:
        scales = _corrected(scaled, formats.decode_e2m1(codes), scales, eden)
    return QuantizedTensor(formats.pack(codes), scales, amax, formats.E2M1_MAX * bound)


def quantize_power_of_two(
    x: Tensor, *, element: str, tile: tuple[int, int], noise: Tensor | None = None
) -> QuantizedTensor:
    """One power-of-two scale per tile, rounded up, and no global scale: mxfp4, mxfp8, fp8_block.

    x: `[R, C]`. element: "e2m1" or "e4m3". tile: (1, 32), (1, 128), (128, 128). noise: as in `quantize_nvfp4`.
    """
    _check(x, tile)
    block_max = _tile_amax(x, tile)
    element_max = formats.E2M1_MAX if element == "e2m1" else formats.E4M3_MAX
    scales = formats.encode_e8m0_up(block_max / torch.full_like(block_max, element_max))
    values = x.float().view(x.shape[0], -1, tile[1])
    scaled = (values.double() / scales.double()[..., None]).float().view(x.shape)  # exact: powers of two
    if element == "e4m3":
        return QuantizedTensor(formats.encode_e4m3(scaled), scales, None)
    codes = formats.encode_e2m1(scaled) if noise is None else formats.encode_e2m1_stochastic(scaled, noise)
    return QuantizedTensor(formats.pack(codes), scales, None)


def _kept_scales(target: Tensor, block_max: Tensor, eden: Eden | None) -> Tensor:
    """The nearest E4M3 scales; with MS-EDEN no block that is not all zeros has a scale of zero."""
    scales = formats.encode_e4m3(target)
    if eden is None:
        return scales
    return torch.where(block_max > 0, scales.float().clamp(min=LEAST_SCALE), scales.float()).to(torch.float8_e4m3fn)


def _corrected(scaled: Tensor, codes: Tensor, scales: Tensor, eden: Eden) -> Tensor:
    """The scales `[R, C/16]` times <y, y> / <y, q> of their group, rounded up with a probability equal to the position
    between two E4M3 numbers. scaled, codes: `[R, C]` in units of each block's scale.

    Sums are made as everywhere: 16 elements one by one, blocks by a tree.
    """
    shape, scale = scales.shape, scales.float()

    def of_groups(terms: Tensor) -> Tensor:
        total = torch.zeros(shape, device=terms.device)
        for element in terms.view(*shape, 16).unbind(-1):
            total = total + element
        parts = ((total * scale) * scale).view(shape[0], -1, eden.group // 16)
        while parts.shape[-1] > 1:
            half = parts.shape[-1] // 2
            parts = parts[..., :half] + parts[..., half:]
        return parts[..., 0]

    energy, product = of_groups(scaled * scaled), of_groups(scaled * codes)
    factor = torch.where(product > 0, energy / product, 1.0).repeat_interleave(eden.group // 16, 1)
    target = (scale * factor).clamp(max=formats.E4M3_MAX)
    _, exponent = torch.frexp(target)  # target = m * 2^exponent with m in [1/2, 1): eight steps in [1/2, 1)
    spacing = torch.ldexp(torch.ones_like(target), (exponent - 1).clamp(min=-6) - 3)
    noise = (((eden.word >> (32 - SCALE_BITS)) & ((1 << SCALE_BITS) - 1)).float() + 0.5) / 2**SCALE_BITS
    return formats.encode_e4m3(torch.floor(target / spacing + noise) * spacing)


def _check(x: Tensor, tile: tuple[int, int]) -> None:
    if x.dim() != 2 or x.shape[0] % tile[0] or x.shape[1] % tile[1]:
        raise ValueError(f"shape {tuple(x.shape)} is not a multiple of the tile {tile[0]}x{tile[1]} (rows x columns)")


def _tile_amax(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """max |x| per tile as FP32 `[R, C/c]`, repeated for each row of a 2-D tile."""
    blocked = x.abs().view(x.shape[0] // tile[0], tile[0], x.shape[1] // tile[1], tile[1])
    return blocked.amax((1, 3)).float().repeat_interleave(tile[0], 0)


def _block_encode(scales: Tensor, global_decode: Tensor) -> Tensor:
    """1 / (block scale * S_dec), from the rounded block scale; FLT_MAX where the block scale is zero."""
    product = scales.float() * global_decode
    return torch.clamp(torch.ones_like(product) / product, max=FLT_MAX)


def _error(
    values: Tensor,
    scales: Tensor,
    global_decode: Tensor,
    amax: Tensor,
    divisor: float,
    measure: str,
    tile: tuple[int, int],
) -> Tensor:
    """Sum per tile, `[R, C/c]`, of the absolute or squared errors of nearest-even codes with these scales.

    The order of the sum is Transformer Engine's (elements of a row one by one, then a tree over the rows of a tile), so
    that near ties fall alike.
    """
    scaled = values * _block_encode(scales, global_decode)[..., None]
    decoded = formats.decode_e2m1(formats.encode_e2m1(scaled)) * scales.float()[..., None]
    decoded = decoded * (amax if amax.dim() == 0 else amax[..., None])
    difference = decoded / torch.full_like(decoded, divisor) - values
    error = difference * difference if measure == "mse" else difference.abs()
    total = torch.zeros_like(error[..., 0])
    for i in range(error.shape[-1]):
        total = total + error[..., i]
    rows = total.view(-1, tile[0], total.shape[1])
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows.view(-1, total.shape[1]).repeat_interleave(tile[0], 0)
