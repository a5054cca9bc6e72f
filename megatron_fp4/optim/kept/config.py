"""What a user can set about the bytes that the optimizer keeps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

BLOCK = 64
"""Elements that share a scale; the cuts of flat ranges (layout.py) fall on multiples of it."""


class MasterFormat(Enum):
    """How FP32 master weights are kept where weights are BF16."""

    fp32 = "fp32"  # 4 bytes beside the weight
    remainder = "remainder"  # the weight is one half, 17 bits beside it are the rest: the same numbers, bit for bit


class MomentFormat(Enum):
    """How a moment is kept between two steps; what is not FP32 is rounded stochastically, by address."""

    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"  # evenly spaced codes, of a second moment of its root
    fp8 = "fp8"  # E4M3; of a second moment, which has no sign, E5M3

    @property
    def in_blocks(self) -> bool:
        """Whether elements share a scale."""
        return self in (MomentFormat.int8, MomentFormat.fp8)


@dataclass(frozen=True)
class MomentsConfig:
    """How moments are kept between two steps. int8 and fp8, with a scale for every 64 elements of a row, are those of
    matrices whose rows are multiples of 64; other tensors keep FP32."""

    first: MomentFormat = MomentFormat.fp32
    """AdamW's mean of the gradients; int8 only beside an int8 second one."""
    second: MomentFormat = MomentFormat.fp32
    """AdamW's mean of the squared gradients."""
    muon: MomentFormat = MomentFormat.fp32
    """Muon's mean of the gradients."""

    @property
    def unit(self) -> int:
        """What parts of rows must be multiples of."""
        return BLOCK if any(format.in_blocks for format in self.by_kind.values()) else 1

    @property
    def by_kind(self) -> dict[str, MomentFormat]:
        """The format of each moment, by the name that it has in a checkpoint."""
        return {"exp_avg": self.first, "exp_avg_sq": self.second, "momentum": self.muon}
