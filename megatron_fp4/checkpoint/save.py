"""Saving, the collective half: the ranks end the save before, agree on this one, and hand it to their threads.

A failed save costs nothing but itself. Older checkpoints stay, every rank learns of it at the next `save` or `wait`,
and training goes on; the next save is the retry.

Not here: bytes (write.py), and the protocol of the directory (commit.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint import commit
from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.outcome import NotSaved, Saved, SaveFailed, SaveReport, SaveStatus
from megatron_fp4.checkpoint.pieces.plan import SaveLayout, in_writing_order, layout_signature, plan_layout
from megatron_fp4.checkpoint.proposal import SaveProposal, exchange_proposals
from megatron_fp4.checkpoint.retention import discard_after
from megatron_fp4.checkpoint.state import SaveContent, encode_meta, shapes_of
from megatron_fp4.checkpoint.write import SaveInProgress, Staging
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Shard

log = logging.getLogger(__name__)


@dataclass
class RunningSave:
    """The save that has begun and is not concluded. reported: `poll` has said how it ended."""

    local: commit.LocalSave
    progress: SaveInProgress
    blocking_seconds: float
    reported: bool = False

    def report(self, outcome: Saved | NotSaved) -> SaveReport:
        step = self.progress.step
        blocking = self.blocking_seconds
        seconds = self.progress.seconds
        if isinstance(outcome, NotSaved):
            return SaveReport(step, SaveStatus.failed, blocking, seconds, error=outcome.reason)
        return SaveReport(step, SaveStatus.committed, blocking, seconds, outcome.num_bytes)


class Saver:
    """At most one save is running; all ranks agree on its outcome before the next one starts."""

    def __init__(self, root: Path, group: Group, config: CheckpointConfig, places: commit.SavePlaces) -> None:
        self.root, self.group = root, group
        self.config = config
        self.running: RunningSave | None = None
        self._places = places
        self._unreported: list[SaveReport] = []  # of saves that were concluded before `poll` saw their end
        self._failures_in_a_row = 0
        self._staging = Staging()
        self._layout: SaveLayout | None = None

    def save(
        self, step: int, shards: Sequence[Shard], meta: Mapping[str, Any], tokens: int | None, score: float | None
    ) -> SaveReport:
        """See `CheckpointStore.save`."""
        began = time.monotonic()
        place = self._places.next(step)
        small = {"step": step, "tokens": tokens, "score": score, "meta": dict(meta)}
        content = self._open(place.directory, shards, small)
        if isinstance(content, NotSaved):
            seconds = time.monotonic() - began
            return self._count(SaveReport(step, SaveStatus.failed, seconds, error=content.reason))
        assert self._layout is not None
        background = self.config.asynchronous
        local = commit.LocalSave(
            place=place,
            rank=self.group.rank,
            config=self.config,
            layout=self._layout,
            content=self._copied(content) if background else content,
        )
        progress = SaveInProgress(step, local.write, self.config.timeout_seconds, background=background)
        self.running = RunningSave(local, progress, time.monotonic() - began)
        if background:
            return SaveReport(step, SaveStatus.writing, self.running.blocking_seconds)
        report = self.wait()
        assert report is not None
        return report

    def _open(self, directory: Path, shards: Sequence[Shard], small: dict[str, Any]) -> SaveContent | NotSaved:
        """Conclude the save before and agree on this one; NotSaved if there is no directory to write into.

        Collective: one message, and the plan if a layout changed. Raises ValueError and SaveFailed on all ranks.
        """
        previous = self._wait_here()
        content, refusal = None, None
        try:
            content = self._content(shards, small)
        except ValueError as caught:
            refusal = str(caught)
        signature = layout_signature(content.shards) if content else None
        replan = self._layout is None or self._layout.signature != signature
        no_directory = None
        if self.group.rank == 0:
            try:
                directory.mkdir(parents=True)
            except OSError as caught:
                no_directory = str(caught)
        agreed = exchange_proposals(SaveProposal(previous, refusal, replan, no_directory), self.group)
        try:
            self._conclude(agreed.previous)
            if agreed.refusal:
                raise ValueError(agreed.refusal)
            assert content is not None
            if agreed.replan:  # once in a run
                self._layout = None
                self._layout = plan_layout(content.shards, self.group)
        except (ValueError, SaveFailed):
            if self.group.rank == 0 and no_directory is None:
                directory.rmdir()
            raise
        return NotSaved(agreed.no_directory) if agreed.no_directory else content

    def _content(self, shards: Sequence[Shard], small: dict[str, Any]) -> SaveContent:
        """Raises ValueError for shards that contradict each other and for what JSON cannot hold."""
        if self.config.keep_every_tokens and small["tokens"] is None:
            raise ValueError("checkpoint.keep_every_tokens is set, but save() was not told the number of tokens")
        shapes_of(shards)
        return SaveContent(tuple(in_writing_order(shards)), encode_meta(small))

    def _copied(self, content: SaveContent) -> SaveContent | NotSaved:
        """A copy in host memory, because the step loop goes on while the thread writes."""
        try:
            return SaveContent(self._staging.copy(content.shards), content.state_json)
        except (RuntimeError, MemoryError) as error:
            return NotSaved(f"no host memory for the copy ({error})")

    def poll(self) -> list[SaveReport]:
        """See `CheckpointStore.poll`."""
        reports, self._unreported = self._unreported, []
        running = self.running
        if running is None or running.reported or not (running.progress.finished or running.progress.hangs()):
            return reports
        outcome = running.progress.join()
        if self.group.rank != 0 and isinstance(outcome, Saved):
            return reports  # whether rank 0 has committed is known at the next `save`
        running.reported = True
        return [*reports, running.report(outcome)]

    def wait(self) -> SaveReport | None:
        """See `CheckpointStore.wait`."""
        report = self.conclude()
        self._unreported = []
        return report

    def conclude(self) -> SaveReport | None:
        """Collective: wait for the running save on all ranks and agree on its outcome, which `poll` still reports."""
        if self.running is None:
            return None
        return self._conclude(exchange_proposals(SaveProposal(self._wait_here()), self.group).previous)

    def _wait_here(self) -> NotSaved | None:
        """Wait for this rank's share of the running save; how it failed, if it did."""
        outcome = self.running.progress.join() if self.running else None
        return outcome if isinstance(outcome, NotSaved) else None

    def _conclude(self, failure: str | None) -> SaveReport | None:
        """The outcome of the running save, which all ranks know; the same on all. Raises SaveFailed."""
        running = self.running
        if running is None:
            return None
        self.running = None
        if not running.progress.finished:
            running.local.give_up()
            self._staging = Staging()  # the hung thread may still read the old buffers
        outcome = running.progress.join()
        if failure is not None:
            outcome = NotSaved(failure)
        elif isinstance(outcome, NotSaved):
            outcome = Saved(0)  # this rank was late to see that its part was taken
        report = running.report(outcome)
        if not running.reported:
            self._unreported.append(report)
        return self._count(report)

    def _count(self, report: SaveReport) -> SaveReport:
        """Log failures and retries; raise if the policy says so. The same on all ranks."""
        failures = self._failures_in_a_row
        if report.status is not SaveStatus.failed:
            if failures and self.group.rank == 0:
                log.warning("checkpoint %d saved, after %d failed saves", report.step, failures)
            self._failures_in_a_row = 0
            return report
        self._failures_in_a_row = failures = failures + 1
        if self.config.max_failures and failures >= self.config.max_failures:
            message = f"{failures} saves in a row failed; the last, {report.step}: {report.error}"
            raise SaveFailed(message, report.error or "")
        if self.group.rank == 0:
            fate = f"failure {failures} in a row; older checkpoints stay, the next save is the retry"
            log.warning("checkpoint %d was not saved (%s): %s", report.step, fate, report.error)
        return report

    def discard_after(self, step: int) -> None:
        """See `CheckpointStore.discard_after`."""
        self.conclude()
        number = self._places.next_number()
        try:
            decided_by_rank0(lambda: discard_after(self.root, step, number), self.group, OSError)
        except OSError as error:
            raise OSError(f"checkpoints after step {step} under {self.root} were not all removed: {error}") from None
