"""The parallel layout of a run, as a value.

Not here: the ranks and groups that a layout is cut into (mesh.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from megatron_fp4.settings import MAX_SECONDS, Bound, Count, Size, check_bounds


class Overlap(Enum):
    """Whether communication runs beside computation. (`on` and `off` would be booleans in YAML.)"""

    auto = "auto"  # on CUDA
    always = "always"
    never = "never"

    def enabled(self, device_type: str) -> bool:
        return self is Overlap.always or (self is Overlap.auto and device_type == "cuda")


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the rank grid and of the groups that share experts, the pipeline's schedule, how long ranks wait."""

    tp: Size = 1
    """Tensor-parallel ranks, which share every linear and every token's activations; innermost, inside a node."""
    pp: Size = 1
    """Pipeline-parallel ranks, each with a part of the blocks; outermost."""
    cp: Size = 1
    """Context-parallel ranks, which share each sequence."""
    dp: Count = 0
    """Data-parallel ranks, which share each global batch; 0 = as many as the world size leaves."""
    ep: Size = 1
    """Expert-parallel ranks, each with a part of the experts: neighbours among the tp * cp * dp ranks of a stage."""
    schedule: str = "1f1b"
    """Order of the microbatches in a pipeline, a name of pipeline/schedules.py."""
    virtual_stages: Count = 0
    """Stages on each pipeline rank; 0 = as many as the schedule needs."""
    stage_split: str = "cost"
    """Blocks of each stage, such as 9,8,8,7; cost = so that the heaviest stage is as light as can be."""
    overlap_tensor: Overlap = Overlap.auto
    """Send the input gradient of a column-parallel linear while its weight gradient is computed; changes no bit."""
    timeout_seconds: Annotated[float, Bound(above=0, most=MAX_SECONDS)] = 600.0
    """Longest wait of a rank in a collective, after which the job ends."""
    init_timeout_seconds: Annotated[float, Bound(above=0, most=MAX_SECONDS)] = 180.0
    """Longest wait for all ranks to meet at the start, and then to make the groups of the layout."""

    def __post_init__(self) -> None:
        check_bounds(self, "parallel")
        if self.overlap_tensor is Overlap.always and self.tp == 1:
            raise ValueError(
                "parallel.overlap_tensor = always has no effect with parallel.tp = 1; leave it at auto, or set"
                " parallel.tp"
            )

    @property
    def smallest_world(self) -> int:
        """Ranks of this layout, with as few data-parallel copies as `ep` takes where `dp` is left open."""
        sharing = self.tp * self.cp
        return sharing * self.pp * (self.dp or self.ep // math.gcd(self.ep, sharing))

    def resolve_dp(self, world_size: int) -> int:
        """The data-parallel size for `world_size` ranks. Raises ValueError with the equation if it does not fit."""
        model = self.tp * self.pp * self.cp
        dp = self.dp or world_size // model
        if dp < 1 or model * dp != world_size:
            asked = self.dp if self.dp else "?"
            raise ValueError(
                f"layout does not fit the world size: tp * pp * cp * dp = {self.tp} * {self.pp} * {self.cp} * {asked}"
                f" must equal {world_size} ranks; start {model * max(self.dp, 1)} ranks, or change the sizes so that"
                f" their product is {world_size}"
            )
        stage = self.tp * self.cp * dp
        if stage % self.ep:
            raise ValueError(
                f"parallel.ep = {self.ep} does not divide the tp * cp * dp = {self.tp} * {self.cp} * {dp} = {stage}"
                f" ranks of a pipeline stage; choose a divisor of {stage}, or another parallel.dp"
            )
        return dp
