"""Back to an earlier checkpoint within a run, and past the samples that led astray.

A rollback is a resume without a restart. State, counters and the window of losses come from the checkpoint; only the
plan of the data gets one more range of samples that are never delivered. The next checkpoint stores that plan; until
there is one, `rollback.json` in the run directory says the same, so that a run which is killed in between goes on as
one that was not. The file belongs to the checkpoint of its step and to earlier ones; later ones know more.
"""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint import CorruptCheckpoint
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.data.order.plan import Plan
from megatron_fp4.storage.durable import fsync_directory, write_durably
from megatron_fp4.storage.patience import UnreadableFile, read_json
from megatron_fp4.train.run import Run, TrainingDiverged

log = logging.getLogger(__name__)
RECORD = "rollback.json"


@dataclass(frozen=True)
class RollbackRecord:
    """Content of `rollback.json`.

    step: the checkpoint to which the run went back. skip: [first, end) sample ids that are never read. rollbacks: how
    many there were, this one included. decay_from: the run's `train.decay_from`, which may lie behind that checkpoint.
    """

    step: int
    skip: list[list[int]]
    rollbacks: int
    decay_from: str = ""

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


def recall(run_dir: Path, meta: dict[str, Any] | None, world: Group) -> RollbackRecord | None:
    """The rollback of which a checkpoint does not know yet, or None. A run that begins anew forgets it.

    meta: the checkpoint's small state, None in a run that begins anew. Collective. Raises ValueError on all ranks if
    the file is damaged.
    """
    path = run_dir / RECORD
    record = decided_by_rank0(lambda: _forget(path) if meta is None else _read_record(path), world)
    return record if record and meta and meta["step"] <= record.step else None


def _forget(path: Path) -> None:
    path.unlink(missing_ok=True)


def _read_record(path: Path) -> RollbackRecord | None:
    """None if there is no file. Raises ValueError if it is damaged; UnreadableFile."""
    try:
        record = RollbackRecord(**read_json(path))
        numbers = [record.step, record.rollbacks, *itertools.chain(*record.skip)]
        if not all(type(number) is int for number in numbers):
            raise TypeError(f"not all of {numbers} are whole numbers")
    except FileNotFoundError:
        return None
    except UnreadableFile:
        raise
    except (ValueError, TypeError) as error:
        reason = error.__cause__ or error
        raise ValueError(f"{path} is damaged ({reason}); remove it to go on without the rollback") from error
    return record


def checkpoint_before(run: Run, step: int) -> int | None:
    """The newest complete checkpoint of an earlier step than `step`. Collective."""
    return max((saved for saved in run.store.complete_steps() if saved < step), default=None)


def roll_back(run: Run, first_step: int, end_sample: int, rollbacks: int) -> tuple[dict[str, Any], range]:
    """Load the newest intact checkpoint before `first_step`; skip what was delivered since, up to the `end_sample`th.

    rollbacks: of this run, this one included; recorded for the case that it is killed before its next checkpoint.
    Returns the checkpoint's small state and the skipped sample ids. Collective. Raises TrainingDiverged if there is no
    such checkpoint.
    """
    remedy = "set train.save_interval_steps, or start anew with a lower optim.lr or other data (data.skip)"
    if checkpoint_before(run, first_step) is None:
        raise TrainingDiverged(
            f"loss spikes since step {first_step}, no checkpoint before it to roll back to; {remedy}"
        )
    try:
        chosen = run.store.choose(before=first_step)
        chosen = run.store.load_or_earlier(chosen, run.optimizer.state_to_fill())
    except CorruptCheckpoint as damage:
        raise TrainingDiverged(f"loss spikes since step {first_step}, and {damage}; {remedy}") from None
    target = chosen.step
    run.optimizer.after_load(chosen.meta["optimizer_steps"])
    plan = run.loader.plan
    skipped = range(int(plan.id_of(chosen.meta["consumed_samples"])), int(plan.id_of(end_sample - 1)) + 1)
    run.loader.plan = Plan(plan.segments, [*plan.skip, (skipped.start, skipped.stop)])
    if run.mesh.is_main:
        skip = [list(part) for part in run.loader.plan.skip]
        record = RollbackRecord(target, skip, rollbacks, run.config.train.decay_from)
        record.write(Path(run.config.train.run_dir))
    run.store.discard_after(target)
    return chosen.meta, skipped
