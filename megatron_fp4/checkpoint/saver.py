"""Saving: the collective half (plan and agreement, on the main thread) and the local half (bytes and commit).

One idea: a failed save costs nothing but itself. Older checkpoints stay, every rank learns of it at the next `save` or
`wait`, and training goes on; the next save is the retry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_fp4.checkpoint import commit
from megatron_fp4.checkpoint.agree import agreed, joined
from megatron_fp4.checkpoint.async_writer import SaveInProgress, Staging
from megatron_fp4.checkpoint.box import Boxes
from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.retention import Saved, steps_to_delete
from megatron_fp4.checkpoint.state import Shard, boxes_of, encode_meta, layout_signature, make_plan
from megatron_fp4.comm import collectives
from megatron_fp4.comm.mesh import Group

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


class Saver:
    """At most one save is running; its outcome is settled (agreed by all ranks) before the next one starts."""

    def __init__(self, root: Path, group: Group, config: CheckpointConfig) -> None:
        self.root, self.group, self.config = root, group, config
        self.running: SaveInProgress | None = None
        self._directory = root  # of the running save
        self._blocking_seconds = 0.0
        self._told = True  # whether `poll` has told the outcome of the running save
        self._untold: list[SaveReport] = []  # outcomes that `save` found when it waited for an earlier save
        self._failures_in_a_row = 0
        self._number = 0  # of this process's saves, in directory names
        self._staging = Staging()
        self._signature: tuple[Any, ...] | None = None
        self._plan: tuple[SavePlan, Metadata | None] | None = None

    def save(
        self, step: int, shards: Sequence[Shard], meta: Mapping[str, Any], tokens: int | None, score: float | None
    ) -> SaveReport:
        """See `CheckpointStore.save`."""
        began = time.monotonic()
        self.settle()
        small = {"step": step, "tokens": tokens, "score": score, "meta": dict(meta)}
        state, state_json = agreed(lambda: self._checked(shards, small), self.group)
        self._plan_for(state)
        directory, error = self._open_directory(step)
        if directory is None:
            return self._count(SaveReport(step, SaveStatus.failed, time.monotonic() - began, error=error))
        self._directory = directory
        staged, copy_error = self._stage(state)
        work = self._work(directory, step, staged, state_json, copy_error)
        timeout, background = self.config.timeout_seconds, self.config.asynchronous
        self.running, self._told = SaveInProgress(step, work, timeout, background=background), False
        self._blocking_seconds = time.monotonic() - began
        if background:
            return SaveReport(step, SaveStatus.writing, self._blocking_seconds)
        report = self.wait()
        assert report is not None
        return report

    def _checked(self, shards: Sequence[Shard], small: dict[str, Any]) -> tuple[dict[str, Boxes], bytes]:
        if self.config.keep_every_tokens and small["tokens"] is None:
            raise ValueError("checkpoint.keep_every_tokens is set, but save() was not told the number of tokens")
        return boxes_of(shards), encode_meta(small)

    def _plan_for(self, state: dict[str, Boxes]) -> None:
        """Plan anew only if some rank's layout changed: a run plans once."""
        signature = layout_signature(state)
        if any(collectives.all_gather_object(signature != self._signature, self.group)):
            self._signature = None
            self._plan = make_plan(state, self.group)
            self._signature = signature

    def _open_directory(self, step: int) -> tuple[Path | None, str | None]:
        """Rank 0 makes the directory; all ranks get its path, or the error."""
        self._number += 1
        name, error = "", None
        if self.group.rank == 0:
            name = commit.passing_name(step, "writing", self._number)
            try:
                (self.root / name).mkdir(parents=True)
            except OSError as caught:
                error = f"rank 0: {caught}"
        name, error = collectives.broadcast_object((name, error), self.group)
        return (None, error) if error else (self.root / name, None)

    def _stage(self, state: dict[str, Boxes]) -> tuple[dict[str, Boxes], str | None]:
        if not self.config.asynchronous:
            return state, None
        try:
            return self._staging.copy(state), None
        except (RuntimeError, MemoryError) as error:  # told by the writer, so that no other rank waits for this one
            return {}, f"no host memory for the copy ({error})"

    def _work(
        self, directory: Path, step: int, state: dict[str, Boxes], state_json: bytes, copy_error: str | None
    ) -> Callable[[SaveInProgress], int]:
        """The local half: returns the bytes of this rank's part; rank 0's ends with the commit."""
        assert self._plan is not None
        plan, metadata = self._plan
        number = self._number

        def write(save: SaveInProgress) -> int:
            try:
                if copy_error:
                    raise MemoryError(copy_error)
                try:
                    part = commit.write_part(directory, self.group.rank, plan, state)
                except FileNotFoundError:
                    raise commit.GivenUp("another rank could not write its part") from None
                if self.group.rank == 0:
                    assert metadata is not None
                    parts = commit.wait_for_parts(directory, self.group.size, save.overdue)
                    commit.seal(directory, step, metadata, state_json, parts)
                    if not save.claim_commit():
                        raise commit.GivenUp("finished after its time-out")
                    commit.publish(directory, self.root, step, number)
            except BaseException:
                self._give_up(directory)
                raise
            if self.group.rank == 0:
                self._retain(step, number)
            return part.num_bytes

        return write

    def _give_up(self, directory: Path) -> None:
        commit.give_up(directory)
        if self.group.rank == 0:
            commit.sweep_failed(self.root)

    def _retain(self, newest: int, number: int) -> None:
        """Rank 0: delete what no rule keeps. Trouble here must not fail the save that was just committed."""
        try:
            saved = []
            for step in commit.complete_steps(self.root):
                try:
                    state = commit.read_state(self.root / commit.step_name(step))
                except ValueError:  # damaged: only its age counts
                    state = {}
                saved.append(Saved(step, state.get("tokens"), state.get("score")))
            for step in steps_to_delete(saved, newest, self.config):
                commit.remove_checkpoint(self.root, step, number)
        except OSError as error:
            log.warning("old checkpoints under %s were not removed: %s", self.root, error)

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
        """Collective: join the running save on all ranks, agree on its outcome, count failures."""
        save = self.running
        if save is None:
            return None
        save.join()
        errors = collectives.all_gather_object(save.error, self.group)
        if not save.finished:
            self._give_up(self._directory)
            self._staging = Staging()  # the hung thread may still read the old buffers
        self.running = None
        # What rank 0 says is what happened. The cause is told by those who did not merely give up after another.
        causes = [None if error and error.startswith(commit.GivenUp.__name__) else error for error in errors]
        report = self._report(save, (joined(causes) or joined(errors)) if errors[0] else None)
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
        self._number += 1
        error = None
        if self.group.rank == 0:
            try:
                commit.set_latest(self.root, step)
                for later in [one for one in commit.present_steps(self.root) if one > step]:
                    commit.remove_checkpoint(self.root, later, self._number)
            except OSError as caught:
                error = str(caught)
        if error := collectives.broadcast_object(error, self.group):
            raise OSError(f"checkpoints after step {step} under {self.root} were not all removed: {error}")
