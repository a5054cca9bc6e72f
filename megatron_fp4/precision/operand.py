"""How one operand of a GEMM is quantized: a value. What has no meaning is refused at construction, with the reason.

Not here: the arithmetic of the formats (numerics/).
(No `from __future__ import annotations`: omegaconf reads the annotations.)
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from megatron_fp4.numerics.eden import LEAST_SCALE
from megatron_fp4.settings import Bound, bounds_of


class Format(Enum):
    """Number format of an operand. `bf16` stands for "not quantized": the compute dtype, BF16 or FP32."""

    bf16 = "bf16"
    nvfp4 = "nvfp4"  # E2M1, E4M3 scale per 16, FP32 scale per tensor (paper section 2)
    mxfp4 = "mxfp4"  # E2M1, power-of-two scale per 32, rounded up (paper section 2)
    mxfp8 = "mxfp8"  # E4M3, power-of-two scale per 32, rounded up
    fp8_block = "fp8_block"  # E4M3, power-of-two scale per 1x128 or 128x128: the paper's FP8 baseline


class Rounding(Enum):
    rne = "rne"  # to nearest, ties to even
    sr = "sr"  # stochastic, as Transformer Engine does it: block maxima above 6 are clipped, a bias of about 1%
    sr_headroom = "sr_headroom"  # stochastic without bias: the block scale is enlarged by 17/16, so nothing is clipped
    ms_eden = "ms_eden"  # to nearest behind a random transform; scales rounded at random undo the bias (2601.22813)


class Signs(Enum):
    """Random signs in front of the Hadamard transform."""

    none = "none"
    fixed = "fixed"  # one vector for all layers and steps (paper section 4.2)
    per_step = "per_step"  # a new vector per layer and step
    per_index = "per_index"  # a sign of its own, new at each step, for every index along the contraction


class ScaleOrder(Enum):
    """Order of the multiplications in the block scale of nvfp4; E4M3 ties fall differently."""

    te = "te"  # amax_b * (S_enc * (1/6)), Transformer Engine 2.14 and later
    paper = "paper"  # (amax_b / 6) * S_enc, the paper's appendix B and Transformer Engine up to 2.13


class AmaxScope(Enum):
    """Over what the FP32 scale of nvfp4 is taken."""

    tensor = "tensor"  # the logical tensor: equal numbers in any parallel layout
    shard = "shard"  # the part on this rank (what Transformer Engine does for weights)
    row = "row"  # each row of the local operand (one scale per token or output feature)
    group128 = "group128"  # each 128 elements along the contraction, instead of the tensor (arXiv 2510.27527)
    static = "static"  # that of the first batches of the run, measured once (of fprop.x); as tensor until then
    expert_call = "expert_call"  # all rows that reach an expert in one call, as Transformer Engine: other with other ep


class AmaxRounding(Enum):
    """What becomes of the amax below the FP32 scale of nvfp4."""

    none = "none"
    power_of_two = "power_of_two"  # raised, less than twice, until that scale is a power of two


class FourOverSix(Enum):
    """Choose per block between the scale that maps its maximum to 6 and one that maps it to 4 (arXiv 2512.02010)."""

    off = "off"
    mae = "mae"  # keep the one with the smaller sum of absolute errors
    mse = "mse"  # keep the one with the smaller sum of squared errors


TILES: dict[Format, tuple[tuple[int, int], ...]] = {
    Format.bf16: (),
    Format.nvfp4: ((1, 16), (16, 16)),
    Format.mxfp4: ((1, 32),),
    Format.mxfp8: ((1, 32),),
    Format.fp8_block: ((1, 128), (128, 128)),
}
OUTER_BLOCK = 128
"""Elements that share the FP32 scale of `amax_scope=group128`."""
RHT_SIZES = (0, 4, 16, 32, 64, 128)


@dataclass(frozen=True)
class Operand:
    """How one operand of one GEMM is quantized.

    Raises ValueError for every combination in which a setting would have no meaning.
    """

    format: Format = Format.bf16
    """Number format of the codes and their scales."""
    tile: tuple[int, int] | None = None
    """Rows and elements along the contraction that share a block scale; null = one row, as the format has it."""
    rounding: Rounding = Rounding.rne
    """How an element between two codes is rounded."""
    noise_bits: Annotated[int, Bound(only=(8, 20))] = 8
    """Random bits per element of stochastic rounding; 8 as Transformer Engine."""
    rht_size: Annotated[int, Bound(only=RHT_SIZES)] = 0
    """Length of the random Hadamard transform along the contraction, equal for both operands; 0 = none."""
    rht_signs: Signs = Signs.fixed
    """Random signs in front of the Hadamard transform."""
    scale_order: ScaleOrder = ScaleOrder.te
    """Order of the multiplications in the block scale of nvfp4."""
    amax_scope: AmaxScope = AmaxScope.tensor
    """Over what the FP32 scale of nvfp4 is taken."""
    amax_rounding: AmaxRounding = AmaxRounding.none
    """Whether the FP32 scale of nvfp4 is made a power of two, by a larger amax; other amaxes then change few codes."""
    four_over_six: FourOverSix = FourOverSix.off
    """Whether each block of nvfp4 may choose a scale that maps its maximum to 4 instead of 6, and by which error."""
    four_over_six_bound: Annotated[int, Bound(only=(256, 448))] = 256
    """Largest block scale before the factor 1.5 of four_over_six; 256 leaves room for it below 448."""
    center: bool = False
    """Quantize an activation without its mean over the tokens of a microbatch, which the product gets back exactly."""

    def __post_init__(self) -> None:
        if self.tile is not None:
            object.__setattr__(self, "tile", tuple(self.tile))  # a YAML list
        elif self.quantized:
            object.__setattr__(self, "tile", TILES[self.format][0])
        for reason in _objections(self):
            raise ValueError(f"operand with format={self.format.name}: {reason}")

    def __str__(self) -> str:
        """`nvfp4 sr rht16`: the format and every setting that is not that format's default, so no two print alike."""
        parts = [self.format.name]
        if self.tile is not None and self.tile != TILES[self.format][0]:
            parts.append(f"{self.tile[0]}x{self.tile[1]}")
        if self.rounding is not Rounding.rne:
            parts.append(self.rounding.name)
        if self.rht_size:
            parts.append(f"rht{self.rht_size}")
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if setting.name not in ("format", "tile", "rounding", "rht_size") and value != setting.default:
                parts.append(f"{setting.name}={value.name if isinstance(value, Enum) else value}")
        return " ".join(parts)

    @property
    def quantized(self) -> bool:
        return self.format is not Format.bf16

    @property
    def stochastic(self) -> bool:
        """Whether the codes are rounded at random."""
        return self.rounding in (Rounding.sr, Rounding.sr_headroom)

    @property
    def eden(self) -> bool:
        """Whether block scales are rounded at random, by what nearest codes of their group have lost."""
        return self.rounding is Rounding.ms_eden

    @property
    def random(self) -> bool:
        """Whether seed and step go into it: it is another one at each step, though its tensor is the same."""
        return self.stochastic or self.eden or self.rht_signs in (Signs.per_step, Signs.per_index)

    @property
    def centred_noise(self) -> bool:
        """Whether noise of b bits is (k + 1/2) / 2^b, without bias; as Transformer Engine's of nvfp4 it is k / 2^b."""
        return self.rounding is Rounding.sr_headroom or (self.stochastic and self.format is Format.mxfp4)

    @property
    def transposes(self) -> bool:
        """Whether a tensor and its transpose get the same codes, so that one copy serves both directions."""
        square = self.tile is not None and self.tile[0] == self.tile[1]
        return square and self.rht_size == 0 and not self.random

    @property
    def contraction_multiple(self) -> int:
        """The contracted dimension of the local operand must be a multiple of this."""
        outer = OUTER_BLOCK if self.amax_scope is AmaxScope.group128 else 1
        return max(self.tile[1] if self.tile else 1, self.rht_size, outer)

    @property
    def scale_bound(self) -> float:
        """Largest block scale that the global scale of nvfp4 aims at: 448, or lower where a factor will be applied."""
        if self.four_over_six is not FourOverSix.off:
            return float(self.four_over_six_bound)
        if self.eden:
            return 256.0  # room for the correction
        return 416.0 if self.rounding is Rounding.sr_headroom else 448.0  # 416 * 17/16 still rounds to 448

    @property
    def least_scale(self) -> float:
        """Smallest scale of a block that is not all zeros; 0: it may be flushed."""
        return LEAST_SCALE if self.eden else 0.0


def _objections(operand: Operand) -> list[str]:
    """Reasons why the combination has no meaning (empty if it has one)."""
    defaults = {f.name: f.default for f in dataclasses.fields(Operand)}
    changed = {name for name, value in defaults.items() if getattr(operand, name) != value} - {"format", "tile"}
    reasons = []
    if operand.format is Format.bf16:
        transform = {"rht_size", "rht_signs"} if operand.rht_size else set()  # that of the other operand of its GEMM
        if changed - transform or operand.tile is not None:
            names = ", ".join(sorted(changed | ({"tile"} if operand.tile else set())))
            reasons.append(f"nothing is quantized, so {names} would have no effect; leave them out or choose a format")
        if operand.rht_size not in RHT_SIZES:
            reasons.append(f"rht_size={operand.rht_size}; use {bounds_of(Operand)['rht_size']}")
        return reasons
    if operand.tile not in TILES[operand.format]:
        allowed = " or ".join(f"{rows}x{cols}" for rows, cols in TILES[operand.format])
        reasons.append(f"tile {operand.tile} does not exist in this format; use {allowed}")
    for name, bound in bounds_of(Operand).items():
        if not bound.allows(getattr(operand, name)):
            reasons.append(f"{name}={getattr(operand, name)}; use {bound}")
    if operand.rht_size == 0 and "rht_signs" in changed:
        reasons.append(f"rht_signs={operand.rht_signs.name} without a transform (rht_size=0)")
    if not operand.stochastic and "noise_bits" in changed:
        reasons.append("noise_bits with nearest-even rounding, which draws no noise")
    if operand.eden:
        reasons += _eden_objections(operand)
    if operand.four_over_six is FourOverSix.off and "four_over_six_bound" in changed:
        reasons.append("four_over_six_bound while four_over_six is off")
    if operand.format in (Format.mxfp8, Format.fp8_block) and operand.stochastic:
        reasons.append("stochastic rounding is defined for E2M1 codes only; FP8 recipes round to nearest")
    if operand.format is not Format.nvfp4:
        only = changed & {"scale_order", "amax_scope", "amax_rounding", "four_over_six", "four_over_six_bound"}
        if only:
            reasons.append(f"{', '.join(sorted(only))} need(s) the two-level scales of nvfp4")
        if operand.rounding is Rounding.sr_headroom:
            reasons.append("sr_headroom: its scales are rounded up, so nothing is clipped and plain sr has no bias")
        return reasons
    if operand.amax_scope in (AmaxScope.row, AmaxScope.group128) and operand.tile == (16, 16):
        scope = operand.amax_scope.name
        reasons.append(f"amax_scope={scope} gives every row its own scale, but a 16x16 tile shares one among 16 rows")
    if operand.four_over_six is not FourOverSix.off and "scale_order" in changed:
        reasons.append("scale_order with four_over_six, which has one order, (amax_b / 6) * S_enc")
    if operand.four_over_six is not FourOverSix.off and operand.rounding is Rounding.sr_headroom:
        reasons.append("sr_headroom with four_over_six: the choice between the scales already sets the headroom")
    return reasons


def _eden_objections(operand: Operand) -> list[str]:
    """What takes its meaning from ms_eden."""
    reasons = []
    if operand.format is not Format.nvfp4:
        reasons.append("ms_eden rounds the E4M3 scales of nvfp4; use that format, or another rounding")
    if operand.rht_size < 16 or operand.rht_signs not in (Signs.per_step, Signs.per_index):
        reasons.append(
            "ms_eden has no bias only in the mean over random transforms, and corrects each of their groups; use"
            " rht_size=128 with rht_signs=per_index (of both operands of the GEMM)"
        )
    if operand.tile == (16, 16):
        reasons.append(
            "ms_eden corrects groups along the contraction, and a 16x16 tile has one scale for 16 rows; use 1x16"
        )
    if operand.four_over_six is not FourOverSix.off and operand.four_over_six_bound != 256:
        reasons.append("four_over_six_bound=448 with ms_eden leaves its correction no room below 448; use 256")
    return reasons
