"""What became of a save: on this rank (`Saved | NotSaved`), and as all ranks agree on it (`SaveReport`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Saved:
    """This rank's part is on disk; on rank 0: the whole checkpoint. num_bytes: the size of the part."""

    num_bytes: int


@dataclass(frozen=True)
class NotSaved:
    """The save has failed. is_consequence: only because it was given up elsewhere, where the cause is known."""

    reason: str
    is_consequence: bool = False


class SaveFailed(RuntimeError):
    """`max_failures` saves in a row have failed. reason: of the last one."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class SaveStatus(Enum):
    """How far a save is."""

    writing = "writing"
    committed = "committed"
    failed = "failed"


@dataclass(frozen=True)
class SaveReport:
    """What became of a save.

    blocking_seconds: how long `save` held up the step loop. seconds: until commit or failure. num_bytes: this rank's
    part. error: the cause of a failure, with the ranks that met it.
    """

    step: int
    status: SaveStatus
    blocking_seconds: float
    seconds: float = 0.0
    num_bytes: int = 0
    error: str | None = None
