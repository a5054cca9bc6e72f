"""Checkpoints of a run: save, find, verify, load, keep.

One idea: a save has a collective half (plan and agreement, on the main thread) and a local half (bytes and commit, on
any thread, without collectives). A failed save costs nothing but itself: older checkpoints stay, all ranks learn of it
at the next `save` or `wait`, and training goes on.

    store = CheckpointStore(root, world, CheckpointConfig())
    store.save(step, optimizer.state_shards(), meta, tokens=tokens)      # all ranks
    for report in store.poll(): log(report)                              # every step, no communication
    if store.latest() is not None: meta = store.load(None, optimizer.state_shards()); optimizer.after_load()
    store.close()                                                        # before the process groups go

`save`, `wait`, `load`, `read_meta`, `latest`, `complete_steps`, `discard_after` and `close` are collective over the
group; `poll` is local.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, cast

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_fp4.checkpoint import commit
from megatron_fp4.checkpoint.async_writer import SaveInProgress, Staging
from megatron_fp4.checkpoint.box import Boxes, BoxLoadPlanner
from megatron_fp4.checkpoint.config import CheckpointConfig, OnCorrupt
from megatron_fp4.checkpoint.files import problem_of, read_manifest, share_of
from megatron_fp4.checkpoint.retention import Saved, steps_to_delete
from megatron_fp4.checkpoint.state import (
    Shard,
    boxes_of,
    check_matches,
    encode_meta,
    first_error,
    layout_signature,
    make_plan,
)
from megatron_fp4.comm import collectives
from megatron_fp4.comm.mesh import Group

log = logging.getLogger(__name__)
T = TypeVar("T")


class CorruptCheckpoint(RuntimeError):
    """A checkpoint is torn or altered; the message names files, expected and actual values."""


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


class CheckpointStore:
    """The checkpoints under `root`, which all ranks of `group` (the world) see."""

    def __init__(self, root: str | os.PathLike[str], group: Group, config: CheckpointConfig) -> None:
        self.root, self.group, self.config = Path(root), group, config
        self._staging = Staging()
        self._running: SaveInProgress | None = None
        self._directory = self.root  # of the running save
        self._blocking_seconds = 0.0
        self._told = True  # whether `poll` has told the outcome of the running save
        self._untold: list[SaveReport] = []  # outcomes that `save` found when it waited for an earlier save
        self._failures_in_a_row = 0
        self._number = 0
        self._signature: tuple[Any, ...] | None = None
        self._plan: tuple[SavePlan, Metadata | None] | None = None
        if group.rank == 0:
            for name in commit.sweep(self.root):
                log.warning("removed %s, left by a run that ended while writing it", self.root / name)
        collectives.barrier(group)

    # ---- save

    def save(
        self,
        step: int,
        shards: Sequence[Shard],
        meta: Mapping[str, Any],
        *,
        tokens: int | None = None,
        score: float | None = None,
    ) -> SaveReport:
        """Save all shards of all ranks and rank 0's `meta` (plain JSON values) as checkpoint `step`.

        Asynchronous: returns after the copy to host memory with status `writing`; the outcome comes by `poll` or
        `wait`. A still running earlier save is waited for first. tokens, score: for the retention rules.
        Raises ValueError (all ranks) on overlapping or incomplete shards or unstorable meta: a bug; SaveFailed by
        `max_failures`. Disk trouble never raises: the report says `failed`.
        """
        began = time.monotonic()
        self._settle()
        small = {"step": step, "tokens": tokens, "score": score, "meta": dict(meta)}
        state, state_json = self._agreed(lambda: (boxes_of(shards), encode_meta(small)))
        self._plan_for(state)
        directory, error = self._open_directory(step)
        if directory is None:
            return self._count(SaveReport(step, SaveStatus.failed, time.monotonic() - began, error=error))
        self._directory = directory
        staged, copy_error = self._stage(state)
        work = self._work(directory, step, staged, state_json, copy_error)
        timeout, background = self.config.timeout_seconds, self.config.asynchronous
        self._running, self._told = SaveInProgress(step, work, timeout, background=background), False
        self._blocking_seconds = time.monotonic() - began
        if not background:
            report = self.wait()
            assert report is not None
            return report
        return SaveReport(step, SaveStatus.writing, self._blocking_seconds)

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
        assert self._plan is not None
        plan, metadata = self._plan
        number = self._number

        def write(save: SaveInProgress) -> int:
            try:
                if copy_error:
                    raise MemoryError(copy_error)
                part = commit.write_part(directory, self.group.rank, plan, state)
                if self.group.rank == 0:
                    assert metadata is not None
                    parts = commit.wait_for_parts(directory, self.group.size, save.overdue)
                    commit.seal(directory, step, metadata, state_json, parts)
                    if not save.claim_commit():
                        raise commit.GivenUp("finished after its time-out")
                    commit.publish(directory, self.root, step, number)
            except BaseException as error:
                if isinstance(error, OSError) and not directory.exists():
                    error = commit.GivenUp("another rank could not write its part")
                self._give_up(directory)
                raise error
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
                state = commit.read_state(self.root / commit.step_name(step))
                saved.append(Saved(step, state.get("tokens"), state.get("score")))
            for step in steps_to_delete(saved, newest, self.config):
                commit.remove_checkpoint(self.root, step, number)
        except (OSError, ValueError) as error:
            log.warning("old checkpoints under %s were not removed: %s", self.root, error)

    def poll(self) -> list[SaveReport]:
        """Outcomes of saves, each once, as soon as this rank knows: rank 0 of commit or failure, other ranks of a
        failure of their own part, and of the rest at the next `save`. No communication; call it every step."""
        reports, self._untold = self._untold, []
        save = self._running
        if save is None or self._told or not (save.finished or save.hangs()):
            return reports
        save.join()
        if self.group.rank != 0 and save.error is None:
            return reports
        self._told = True
        return [*reports, self._report(save, save.error)]

    def wait(self) -> SaveReport | None:
        """Wait for the running save, if any; the outcome on which all ranks agree."""
        report = self._settle()
        self._untold = []
        return report

    def close(self) -> SaveReport | None:
        """`wait`, to be called before the process groups are destroyed."""
        return self.wait()

    def _settle(self) -> SaveReport | None:
        """Collective: join the running save on all ranks, agree on its outcome, count failures."""
        save = self._running
        if save is None:
            return None
        save.join()
        errors = collectives.all_gather_object(save.error, self.group)
        if not save.finished:
            self._give_up(self._directory)
            self._staging = Staging()  # the hung thread may still read the old buffers
        self._running = None
        told = [None if error and error.startswith("GivenUp") else error for error in errors]
        error = (first_error(told) or first_error(errors)) if errors[0] else None
        report = self._report(save, error)
        if not self._told:
            self._untold.append(report)
        return self._count(report)

    def _report(self, save: SaveInProgress, error: str | None) -> SaveReport:
        status = SaveStatus.failed if error else SaveStatus.committed
        return SaveReport(save.step, status, self._blocking_seconds, save.seconds, save.num_bytes, error)

    def _count(self, report: SaveReport) -> SaveReport:
        """Log failures and retries; raise if the policy says so. The same on all ranks."""
        if report.status is not SaveStatus.failed:
            if self._failures_in_a_row and self.group.rank == 0:
                log.warning("checkpoint %d saved, after %d failed saves", report.step, self._failures_in_a_row)
            self._failures_in_a_row = 0
            return report
        self._failures_in_a_row += 1
        if self.group.rank == 0:
            log.warning(
                "checkpoint %d was not saved (failure %d in a row; older checkpoints stay, the next save is the"
                " retry): %s", report.step, self._failures_in_a_row, report.error
            )  # fmt: skip
        if self.config.max_failures and self._failures_in_a_row >= self.config.max_failures:
            raise SaveFailed(
                f"{self._failures_in_a_row} saves in a row failed; the last, {report.step}: {report.error}"
            )
        return report

    # ---- find and load

    def latest(self) -> int | None:
        """The step that a resume tries first, or None if there is no checkpoint."""
        return self._from_first(lambda: commit.latest_step(self.root))

    def complete_steps(self) -> list[int]:
        return self._from_first(lambda: commit.complete_steps(self.root))

    def read_meta(self, step: int | None = None) -> dict[str, Any]:
        """`meta` of a checkpoint (default: as `load(None, ...)` would choose), with "step"; before a model exists."""
        return self._newest_good(step, lambda _: None)

    def load(self, step: int | None, shards: Sequence[Shard]) -> dict[str, Any]:
        """Fill the shards' tensors in place from checkpoint `step` (None: the newest intact one, by `on_corrupt`).

        Replicas are filled too. Kinds of tensors that no shard has are not read. Returns `meta` with "step".
        Raises FileNotFoundError if there is none, CorruptCheckpoint, or ValueError listing names and shapes that
        differ; the same on all ranks. After CorruptCheckpoint the tensors' contents are undefined.
        """
        state = self._agreed(lambda: boxes_of(shards))
        return self._newest_good(step, lambda directory: self._read(directory, state))

    def discard_after(self, step: int) -> None:
        """After a rollback to `step`: delete the checkpoints above it and make it `latest`."""
        self._settle()
        error = None
        if self.group.rank == 0:
            try:
                commit.set_latest(self.root, step)
                for later in [one for one in commit.present_steps(self.root) if one > step]:
                    self._number += 1
                    commit.remove_checkpoint(self.root, later, self._number)
            except OSError as caught:
                error = str(caught)
        if error := collectives.broadcast_object(error, self.group):
            raise OSError(f"checkpoints after step {step} under {self.root} were not all removed: {error}")

    def _agreed(self, make: Callable[[], T]) -> T:
        """`make()`, or the ValueError of any rank on all ranks: nobody is left waiting in the next collective."""
        value, error = None, None
        try:
            value = make()
        except ValueError as caught:
            error = str(caught)
        if error := first_error(collectives.all_gather_object(error, self.group)):
            raise ValueError(error)
        return cast(T, value)

    def _from_first(self, read: Callable[[], Any]) -> Any:
        """Rank 0 looks at the file system, the others believe it: clients of a shared one may see it differently."""
        return collectives.broadcast_object(read() if self.group.rank == 0 else None, self.group)

    def _newest_good(self, step: int | None, read: Callable[[Path], str | None]) -> dict[str, Any]:
        """Try the candidates; `read` fills tensors and returns all ranks' error (corruption) or None."""
        self._settle()
        candidates, complete = self._from_first(lambda: self._candidates(step))
        if not candidates:
            asked = "no checkpoint" if step is None else f"no checkpoint {commit.step_name(step)}"
            raise FileNotFoundError(f"{asked} under {self.root}; complete ones: {complete}")
        for candidate in candidates:
            directory = self.root / commit.step_name(candidate)
            problem = self._verify(directory) or read(directory)
            state, state_problem = self._read_state(directory)
            problem = problem or state_problem
            if problem is None:
                return {"step": state["step"], **state["meta"]}
            if step is not None or self.config.on_corrupt is OnCorrupt.fail:
                raise CorruptCheckpoint(f"checkpoint {directory.name} is refused: {problem}")
            if self.group.rank == 0:
                log.warning("checkpoint %s is refused, trying the previous one: %s", directory.name, problem)
        raise CorruptCheckpoint(f"no intact checkpoint under {self.root}; tried {candidates}; the last: {problem}")

    def _candidates(self, step: int | None) -> tuple[list[int], list[int]]:
        """Steps to try, and the complete ones for the error message."""
        order = commit.load_order(self.root) if step is None else [step]
        present = commit.present_steps(self.root)
        return [one for one in order if one in present], commit.complete_steps(self.root)

    def _verify(self, directory: Path) -> str | None:
        """Each rank checks its share of the files; all ranks return the same problems or None."""
        try:
            files = read_manifest(directory)
            mine = share_of(files, self.group.rank, self.group.size) if self.config.verify else []
            problems = [problem for name in mine if (problem := problem_of(directory, name, files[name]))]
        except ValueError as error:
            problems = [str(error)]
        found = [one for many in collectives.all_gather_object(problems, self.group) for one in many]
        return "; ".join(dict.fromkeys(found)) or None

    def _read_state(self, directory: Path) -> tuple[dict[str, Any], str | None]:
        def read() -> tuple[dict[str, Any], str | None]:
            try:
                return commit.read_state(directory), None
            except ValueError as error:
                return {}, str(error)

        return self._from_first(read)

    def _read(self, directory: Path, state: dict[str, Boxes]) -> str | None:
        metadata, error = None, None
        reader = FileSystemReader(directory)
        try:
            metadata = reader.read_metadata()
        except Exception as caught:  # whatever unpickling a damaged file raises
            error = f"{directory / '.metadata'}: {type(caught).__name__}: {caught}"
        if error := first_error(collectives.all_gather_object(error, self.group)):
            return error
        assert metadata is not None
        check_matches(state, metadata, self.group, str(directory))
        try:
            reader.set_up_storage_reader(metadata, is_coordinator=False)
            planner = BoxLoadPlanner(state, metadata)
            reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as caught:  # an unreadable file in spite of a good hash: the disk, or verify=False
            error = f"{type(caught).__name__}: {caught}"
        return first_error(collectives.all_gather_object(error, self.group))
