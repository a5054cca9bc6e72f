"""Settings of checkpoints: how they are written, how many stay, what happens when one is damaged.

Where and when to save is the trainer's business; so the directory and the interval are not here.
"""

from dataclasses import dataclass
from enum import Enum


class OnCorrupt(Enum):
    """What a resume does when the newest checkpoint is torn or altered."""

    previous = "previous"  # warn and take the newest intact one before it
    fail = "fail"  # stop with the file's name, expected and actual values


@dataclass(frozen=True)
class CheckpointConfig:
    """asynchronous: the step loop stops only for the copy to host memory; otherwise until the checkpoint is complete.

    verify: check sizes and hashes of all files before a load.
    keep_last: this many newest checkpoints stay. keep_every_tokens: besides, the first one after each multiple of so
    many tokens (0 = none). keep_best: besides, so many with the lowest score (0 = none): the loss on the first
    evaluation set, if there was an evaluation at the step of the save.
    timeout_seconds: a save that takes longer has failed; must be below the process groups' time-out, because at the
    next save the other ranks wait in a collective for the slowest one.
    max_failures: after so many failed saves in a row the next `save` or `wait` raises on all ranks (0 = never:
    training goes on, each failure is logged, the next save is the retry).
    """

    asynchronous: bool = True
    verify: bool = True
    on_corrupt: OnCorrupt = OnCorrupt.previous
    keep_last: int = 2
    keep_every_tokens: int = 0
    keep_best: int = 0
    timeout_seconds: float = 300.0
    max_failures: int = 0

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last = {self.keep_last}, must be at least 1 (2 survives a damaged file)")
        for name in ("keep_every_tokens", "keep_best", "max_failures"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name} = {getattr(self, name)}, must be 0 (off) or positive")
        if self.timeout_seconds <= 0:
            raise ValueError(f"checkpoint.timeout_seconds = {self.timeout_seconds}, must be positive")
