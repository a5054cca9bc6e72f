"""Saving: the collective half (plan and agreement, on the main thread) and the local half (bytes and commit).

One idea: a failed save costs nothing but itself. Older checkpoints stay, every rank learns of it at the next `save` or
`wait`, and training goes on; the next save is the retry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_fp4.checkpoint import commit
from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.dcp import StoredTensor
from megatron_fp4.checkpoint.directory import passing_name, present_steps
from megatron_fp4.checkpoint.local_save import LocalSave
from megatron_fp4.checkpoint.state import encode_meta, layout_signature, make_plan, stored_tensors
from megatron_fp4.checkpoint.sweep import remove_checkpoint
from megatron_fp4.checkpoint.write import SaveInProgress, Staging
from megatron_fp4.comm import collectives
from megatron_fp4.comm.agree import errors_by_rank
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard
from megatron_fp4.storage.owner import Owner

log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """`max_failures` saves in a row have failed."""


class SaveStatus(Enum):
    writing = "writing"
    committed = "committed"
    failed = "failed"


@dataclass(frozen=True)
class SaveReport:
    """blocking_seconds: how long `save` held up the step loop. seconds: until commit or failure. num_bytes: this
    rank's part."""

    step: int
    status: SaveStatus
    blocking_seconds: float
    seconds: float = 0.0
    num_bytes: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Opening:
    """What each rank says before a save, in the one message that all exchange.

    previous: error of the save before. refused: what is wrong with its shards or meta. replan: its layout is not the
    planned one. no_directory: why rank 0 could not make the directory.
    """

    previous: str | None
    refused: str | None
    replan: bool
    no_directory: str | None


SILENCE = Opening(None, None, replan=False, no_directory=None)


class Saver:
    """At most one save is running; its outcome is settled (agreed by all ranks) before the next one starts.

    owner: rank 0's process, in directory names.
    """

    def __init__(self, root: Path, group: Group, config: CheckpointConfig, owner: Owner) -> None:
        self.root, self.group, self.config = root, group, config
        self.running: SaveInProgress | None = None
        self._owner = owner
        self._local: LocalSave | None = None  # of the running save
        self._blocking_seconds = 0.0
        self._told = True  # whether `poll` has told the outcome of the running save
        self._untold: list[SaveReport] = []  # outcomes that `save` found when it waited for an earlier save
        self._failures_in_a_row = 0
        self._number = 0  # of this process's changes, in directory names
        self._staging = Staging()
        self._signature: tuple[Any, ...] | None = None
        self._plan: tuple[SavePlan, Metadata | None] | None = None

    def save(
        self, step: int, shards: Sequence[Shard], meta: Mapping[str, Any], tokens: int | None, score: float | None
    ) -> SaveReport:
        """See `CheckpointStore.save`."""
        began = time.monotonic()
        number = self._next_number()
        small = {"step": step, "tokens": tokens, "score": score, "meta": dict(meta)}
        directory = self.root / passing_name(step, "writing", self._owner, number)
        state, state_json, no_directory = self._open(directory, shards, small)
        if no_directory:
            return self._count(SaveReport(step, SaveStatus.failed, time.monotonic() - began, error=no_directory))
        assert self._plan is not None
        place = (self.root, directory, number, self.group.rank, self.group.size, self.config)
        staged, copy_error = self._stage(state)
        self._local = LocalSave(*place, *self._plan, staged, state_json, copy_error)
        timeout, background = self.config.timeout_seconds, self.config.asynchronous
        self.running, self._told = SaveInProgress(step, self._local.write, timeout, background=background), False
        self._blocking_seconds = time.monotonic() - began
        if background:
            return SaveReport(step, SaveStatus.writing, self._blocking_seconds)
        report = self.wait()
        assert report is not None
        return report

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _open(
        self, directory: Path, shards: Sequence[Shard], small: dict[str, Any]
    ) -> tuple[dict[str, StoredTensor], bytes, str | None]:
        """Settle the save before and agree on this one: state, JSON of the small state, why there is no directory.

        Collective: one message, and the plan if a layout changed. Raises ValueError and SaveFailed on all ranks.
        """
        previous = self._join()
        state, state_json, refused = self._checked(shards, small)
        signature = layout_signature(state)
        no_directory = _make(directory) if self.group.rank == 0 else None
        mine = Opening(previous, refused, signature != self._signature, no_directory)
        said = collectives.all_gather_if_any(mine, SILENCE, self.group)
        try:
            self._conclude([one.previous for one in said])
            if error := errors_by_rank([one.refused for one in said]):
                raise ValueError(error)
            if any(one.replan for one in said):  # a run plans once
                self._signature = None
                self._plan = make_plan(state, self.group)
                self._signature = signature
        except (ValueError, SaveFailed):
            if self.group.rank == 0 and no_directory is None:
                directory.rmdir()
            raise
        return state, state_json, errors_by_rank([one.no_directory for one in said])

    def _checked(
        self, shards: Sequence[Shard], small: dict[str, Any]
    ) -> tuple[dict[str, StoredTensor], bytes, str | None]:
        """State and JSON, or what is wrong with them."""
        try:
            if self.config.keep_every_tokens and small["tokens"] is None:
                raise ValueError("checkpoint.keep_every_tokens is set, but save() was not told the number of tokens")
            return stored_tensors(shards), encode_meta(small), None
        except ValueError as error:
            return {}, b"", str(error)

    def _stage(self, state: dict[str, StoredTensor]) -> tuple[dict[str, StoredTensor], str | None]:
        """What the local half writes: a copy, if the step loop goes on meanwhile. Or why there is none."""
        if not self.config.asynchronous:
            return state, None
        try:
            return self._staging.copy(state), None
        except (RuntimeError, MemoryError) as error:
            return {}, f"no host memory for the copy ({error})"

    def poll(self) -> list[SaveReport]:
        """See `CheckpointStore.poll`."""
        reports, self._untold = self._untold, []
        save = self.running
        if save is None or self._told or not (save.finished or save.hangs()):
            return reports
        save.join()
        if self.group.rank != 0 and save.error is None:
            return reports
        self._told = True
        return [*reports, self._report(save, save.error)]

    def wait(self) -> SaveReport | None:
        """Wait for the running save, if any; the outcome on which all ranks agree. Collective."""
        report = self.settle()
        self._untold = []
        return report

    def settle(self) -> SaveReport | None:
        """Collective: wait for the running save on all ranks and agree on its outcome."""
        if self.running is None:
            return None
        return self._conclude(collectives.all_gather_object(self._join(), self.group))

    def _join(self) -> str | None:
        """Wait for this rank's part of the running save; its error."""
        if self.running is None:
            return None
        self.running.join()
        return self.running.error

    def _conclude(self, errors: Sequence[str | None]) -> SaveReport | None:
        """The outcome of the running save from what all ranks said of it; the same on all. Raises SaveFailed."""
        save = self.running
        if save is None:
            return None
        if not save.finished:
            assert self._local is not None
            self._local.give_up()
            self._staging = Staging()  # the hung thread may still read the old buffers
        self.running = self._local = None
        # What rank 0 says is what happened. The cause is told by those who did not merely give up after another.
        causes = [None if error and error.startswith(commit.GivenUp.__name__) else error for error in errors]
        report = self._report(save, (errors_by_rank(causes) or errors_by_rank(errors)) if errors[0] else None)
        if not self._told:
            self._untold.append(report)
        return self._count(report)

    def _report(self, save: SaveInProgress, error: str | None) -> SaveReport:
        status = SaveStatus.failed if error else SaveStatus.committed
        return SaveReport(save.step, status, self._blocking_seconds, save.seconds, save.num_bytes, error)

    def _count(self, report: SaveReport) -> SaveReport:
        """Log failures and retries; raise if the policy says so. The same on all ranks."""
        failures = self._failures_in_a_row
        if report.status is not SaveStatus.failed:
            if failures and self.group.rank == 0:
                log.warning("checkpoint %d saved, after %d failed saves", report.step, failures)
            self._failures_in_a_row = 0
            return report
        self._failures_in_a_row = failures = failures + 1
        if self.group.rank == 0:
            fate = f"failure {failures} in a row; older checkpoints stay, the next save is the retry"
            log.warning("checkpoint %d was not saved (%s): %s", report.step, fate, report.error)
        if self.config.max_failures and failures >= self.config.max_failures:
            raise SaveFailed(f"{failures} saves in a row failed; the last, {report.step}: {report.error}")
        return report

    def discard_after(self, step: int) -> None:
        """See `CheckpointStore.discard_after`."""
        self.settle()
        number = self._next_number()
        error = None
        if self.group.rank == 0:
            try:
                commit.set_latest(self.root, step)
                for later in [one for one in present_steps(self.root) if one > step]:
                    remove_checkpoint(self.root, later, number)
            except OSError as caught:
                error = str(caught)
        if error := collectives.broadcast_object(error, self.group):
            raise OSError(f"checkpoints after step {step} under {self.root} were not all removed: {error}")


def _make(directory: Path) -> str | None:
    """Why not, if it cannot be made."""
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None
