"""Settings of checkpoints: how they are written, how many stay, what happens when one is damaged.

Not here: where and when to save, which is the trainer's business (train/sections.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from megatron_fp4.settings import MAX_SECONDS, Bound, Count, Size, check_bounds


class OnCorrupt(Enum):
    """What a resume does when the newest checkpoint is torn or altered."""

    previous = "previous"  # warn and take the newest intact one before it
    fail = "fail"  # stop with the file's name, expected and actual values


@dataclass(frozen=True)
class CheckpointConfig:
    """How a checkpoint is written, which ones stay, and what happens when one cannot be written or read."""

    asynchronous: bool = True
    """Stop the step loop only for the copy to host memory; false = until the checkpoint is complete, without a copy."""
    verify: bool = True
    """Check sizes and hashes of all files before a load, each rank a share of them; false = only those of the small
    files, which hold names and positions and no tensors."""
    on_corrupt: OnCorrupt = OnCorrupt.previous
    """What a resume does when the newest checkpoint is torn or altered."""
    keep_last: Size = 2
    """Newest checkpoints that stay; with 1 there is nothing to fall back on from a damaged file."""
    keep_every_tokens: Count = 0
    """The first checkpoint after each multiple of this many tokens stays too; 0 = none."""
    keep_best: Count = 0
    """Checkpoints with the lowest loss on the first evaluation set that stay too; a save at a step without an
    evaluation has none; 0 = none."""
    timeout_seconds: Annotated[float, Bound(above=0, most=MAX_SECONDS)] = 300.0
    """A save that takes longer has failed; below parallel.timeout_seconds, because at the next save the other ranks
    wait in a collective for the slowest one."""
    max_failures: Count = 3
    """Failed saves in a row after which the next one ends the run; 0 = never: each failure is logged, the next save is
    the retry."""

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint")
