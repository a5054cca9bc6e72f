"""A rollback that outlives a kill: `rollback.json` in the run directory, until the next checkpoint knows of it.

One idea: a checkpoint that is written after a rollback carries its consequences (samples that are never read, how
often the run was rolled back). Before there is one, this file says the same, so that a run which is killed in between
goes on as the one that was not. It belongs to the checkpoint of its step and to earlier ones; later ones know more.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.comm.collectives import broadcast_object
from megatron_fp4.comm.mesh import Group
from megatron_fp4.storage.durable import fsync_directory, write_durably

log = logging.getLogger(__name__)
RECORD = "rollback.json"


@dataclass(frozen=True)
class RollbackRecord:
    """step: of the checkpoint to which the run went back. skip: [first, end) sample ids that are never read. rollbacks:
    how many there were, this one included.
    """

    step: int
    skip: list[list[int]]
    rollbacks: int

    def __str__(self) -> str:
        ranges = ", ".join(f"{first} to {end - 1}" for first, end in self.skip)
        return f"rollback {self.rollbacks} to checkpoint {self.step} still holds: samples {ranges} are skipped"

    def write(self, run_dir: Path) -> None:
        """Main rank. A disk that refuses it is no reason to stop: the rollback then holds unless the run is killed."""
        try:
            write_durably(run_dir / RECORD, (json.dumps(asdict(self)) + "\n").encode())
            fsync_directory(run_dir)
        except OSError as error:
            log.warning("a kill before the next checkpoint would undo the rollback: %s: %s", run_dir / RECORD, error)


def recall(run_dir: Path, resumed: dict[str, Any] | None, world: Group) -> RollbackRecord | None:
    """The rollback of which the checkpoint `resumed` does not know yet, or None. A run that begins anew forgets it.

    Collective. Raises ValueError on all ranks if the file is damaged.
    """
    text, path = "", run_dir / RECORD
    if world.rank == 0 and path.exists():
        if resumed is None:
            path.unlink()
        else:
            text = path.read_text()
    text = broadcast_object(text, world)
    if resumed is None or not text:
        return None
    try:
        record = RollbackRecord(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to go on without the rollback") from error
    return record if resumed["step"] <= record.step else None
