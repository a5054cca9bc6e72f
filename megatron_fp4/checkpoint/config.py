"""Settings of checkpoints: how they are written, how many stay, what happens when one is damaged.

Not here: where and when to save, which is the trainer's business (train/sections.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from megatron_fp4.settings import MAX_SECONDS, Bound, Count, Place, Size, check_bounds
from megatron_fp4.storage.remote.url import is_shown, url_objection


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
    mirror: Place = ""
    """URL in an object store to which every checkpoint is sent, beside training, and from which a resume takes what is
    newer than on the disk, such as s3://BUCKET/PREFIX; of one run only; empty = none."""
    mirror_keep_last: Count = 0
    """Newest checkpoints that stay in the mirror; the other rules are those of the disk; 0 = as keep_last."""
    mirror_wait_seconds: Annotated[float, Bound(least=0, most=MAX_SECONDS)] = 600.0
    """How long a run waits at its end for the mirror to have its last checkpoint; at most 60 s when it is stopped."""
    max_failures: Count = 3
    """Failed saves in a row after which the next one ends the run; 0 = never: each failure is logged, the next save is
    the retry."""

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint")
        if self.mirror and (objection := url_objection(self.mirror)):
            shown = self.mirror if is_shown(self.mirror) else "(a URL that is not repeated here)"
            raise ValueError(f"checkpoint.mirror = {shown}: {objection}")
