"""The local half of a save: this rank's bytes, and on rank 0 the commit. No communication: it may run in a thread."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_fp4.checkpoint import commit
from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.dcp import StoredTensor
from megatron_fp4.checkpoint.sweep import retain, sweep_failed
from megatron_fp4.checkpoint.write import SaveInProgress


@dataclass(frozen=True, eq=False)
class LocalSave:
    """directory: `step_N.writing-...` under `root`. number: of this process's changes there. metadata: of the whole, on
    rank 0. copy_error: why `state` could not be copied to the host, if so.
    """

    root: Path
    directory: Path
    number: int
    rank: int
    num_ranks: int
    config: CheckpointConfig
    plan: SavePlan
    metadata: Metadata | None
    state: dict[str, StoredTensor]
    state_json: bytes
    copy_error: str | None = None

    def write(self, save: SaveInProgress) -> int:
        """Returns the bytes of this rank's part. What fails here takes the directory out of the others' way."""
        try:
            if self.copy_error:  # told here, so that no other rank waits for this one
                raise MemoryError(self.copy_error)
            try:
                part = commit.write_part(self.directory, self.rank, self.plan, self.state)
            except FileNotFoundError:
                raise commit.GivenUp("another rank could not write its part") from None
            if self.rank == 0:
                self._commit(save)
        except BaseException:
            self.give_up()
            raise
        if self.rank == 0:
            retain(self.root, save.step, self.number, self.config)
        return part.num_bytes

    def _commit(self, save: SaveInProgress) -> None:
        assert self.metadata is not None
        parts = commit.wait_for_parts(self.directory, self.num_ranks, save.overdue)
        commit.seal(self.directory, save.step, self.metadata, self.state_json, parts)
        if not save.claim_commit():
            raise commit.GivenUp("finished after its time-out")
        commit.publish(self.directory, self.root, save.step, self.number)

    def give_up(self) -> None:
        commit.give_up(self.directory)
        if self.rank == 0:
            sweep_failed(self.root)
