"""Rotary position embedding (arXiv 2104.09864), halves convention, FP32 angles, and how it is stretched.

A model that goes on with longer samples than it began with turns slower: all frequencies alike (linear), those below a
wavelength (llama3), or by a ramp over the pairs (yarn, arXiv 2309.00071). The stretched frequencies are part of the
model: weights that were trained with them mean nothing without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import torch
from torch import Tensor

from megatron_fp4.settings import Bound, Count, check_bounds


class RopeScaling(Enum):
    """How the frequencies of the rotary embedding are stretched."""

    none = "none"
    linear = "linear"  # all of them divided by factor
    llama3 = "llama3"  # long wavelengths divided by factor, short ones kept, a ramp between (Llama 3.1)
    yarn = "yarn"  # a ramp over the pairs of a head, and larger products of queries and keys


@dataclass(frozen=True)
class RopeScalingConfig:
    """Stretched rotary embedding, as models have it that were extended to longer samples."""

    kind: RopeScaling = RopeScaling.none
    """How the frequencies of the rotary embedding are stretched."""
    factor: Annotated[float, Bound(least=1, most=1e6)] = 1.0
    """How much longer samples may be than original_length."""
    original_length: Count = 0
    """Tokens of a sample before the model was extended; needed by llama3 and yarn."""
    low_frequency: Annotated[float, Bound(above=0, most=1e6)] = 1.0
    """With llama3, what turns less often than this in original_length tokens is divided by factor."""
    high_frequency: Annotated[float, Bound(above=0, most=1e6)] = 4.0
    """With llama3, what turns more often than this in original_length tokens is kept."""
    beta_fast: Annotated[float, Bound(above=0, most=1e6)] = 32.0
    """With yarn, the ramp begins at the pair that turns so often in original_length tokens."""
    beta_slow: Annotated[float, Bound(above=0, most=1e6)] = 1.0
    """With yarn, the ramp ends at the pair that turns so often in original_length tokens."""
    truncate: bool = True
    """Begin and end the ramp of yarn at whole pairs."""
    attention_factor: Annotated[float, Bound(least=0, most=1e3)] = 0.0
    """With yarn, what cosine and sine are multiplied by; 0 = 1 + ln(factor) / 10."""

    def __post_init__(self) -> None:
        check_bounds(self, "model.rope_scaling")
        if self.kind in (RopeScaling.llama3, RopeScaling.yarn) and not self.original_length:
            raise ValueError(
                f"model.rope_scaling.kind={self.kind.name} needs model.rope_scaling.original_length, the tokens of a"
                " sample before the model was extended"
            )
        if self.kind is RopeScaling.llama3 and self.low_frequency >= self.high_frequency:
            raise ValueError(
                f"model.rope_scaling.low_frequency = {self.low_frequency:g} must be below high_frequency ="
                f" {self.high_frequency:g}"
            )

    @property
    def angle_factor(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.kind is not RopeScaling.yarn:
            return 1.0
        return self.attention_factor or 0.1 * math.log(self.factor) + 1.0


def rope_frequencies(
    rotary_dim: int, base: float, scaling: RopeScalingConfig, device: torch.device | str = "cpu"
) -> Tensor:
    """Radians per position of each pair, float32 `[rotary_dim / 2]`."""
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    frequencies = base**-exponents
    if scaling.kind is RopeScaling.linear:
        return frequencies / scaling.factor
    if scaling.kind is RopeScaling.llama3:
        return _llama3(frequencies, scaling)
    if scaling.kind is RopeScaling.yarn:
        return _yarn(frequencies, rotary_dim, base, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """In the order of operations of `transformers`, whose bits a model was trained with or is served with."""
    low, high = scaling.low_frequency, scaling.high_frequency
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    kept_share = (scaling.original_length / wavelengths - low) / (high - low)
    between = (1 - kept_share) * frequencies / scaling.factor + kept_share * frequencies
    result = torch.where(wavelengths > scaling.original_length / low, stretched, between)
    return torch.where(wavelengths < scaling.original_length / high, frequencies, result)


def _yarn(frequencies: Tensor, rotary_dim: int, base: float, scaling: RopeScalingConfig) -> Tensor:
    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(scaling.original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(rotary_dim // 2, device=frequencies.device, dtype=torch.float32)
    kept_share = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept_share) + frequencies * kept_share


@dataclass(frozen=True)
class Rope:
    """What the angles of a model depend on besides positions; see `rope_frequencies`."""

    rotary_dim: int
    base: float
    scaling: RopeScalingConfig

    def angles(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """See `rope_angles`."""
        frequencies = rope_frequencies(self.rotary_dim, self.base, self.scaling, positions_BS.device)
        return rope_angles(positions_BS, frequencies, self.scaling.angle_factor)


def rope_angles(positions_BS: Tensor, frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles, times `factor`: float32 `[B, S, rotary_dim / 2]`."""
    angles = positions_BS.float()[..., None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def apply_rope(x_BSHE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + R/2) of every head's first R elements; `x.dtype` in and out.

    cos, sin: of the angles, see `rope_angles`.
    """
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotary_dim = 2 * cos.shape[-1]
    first, second = x_BSHE[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSHE.dtype)
    return turned if rotary_dim == x_BSHE.shape[-1] else torch.cat([turned, x_BSHE[..., rotary_dim:]], dim=-1)
