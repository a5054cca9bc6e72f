"""Back to an earlier checkpoint within a run, and past the samples that led astray.

One idea: a rollback is a resume without a restart. State, counters and the window of losses come from the checkpoint;
only the plan of the data gets one more range of samples that are never delivered, which later checkpoints carry on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_fp4.data.order.plan import Plan
from megatron_fp4.train.build import Run
from megatron_fp4.train.faults.rollback_record import RollbackRecord
from megatron_fp4.train.progress import TrainingDiverged


def checkpoint_before(run: Run, step: int) -> int | None:
    """The newest complete checkpoint of an earlier step than `step`. Collective."""
    run.store.saver.settle()  # not `wait`: its outcome is still to be told by the next poll
    return max((saved for saved in run.store.complete_steps() if saved < step), default=None)


def roll_back(
    run: Run, first_step: int, consumed_samples: int, rollbacks: int
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Load the newest checkpoint before `first_step` and skip what was delivered since, up to `consumed_samples`.

    rollbacks: of this run, this one included; recorded for the case that it is killed before its next checkpoint.
    Returns the checkpoint's small state and the skipped sample ids [first, end). Collective. Raises TrainingDiverged if
    there is no such checkpoint.
    """
    target = checkpoint_before(run, first_step)
    if target is None:
        raise TrainingDiverged(
            f"loss spikes since step {first_step}, and no checkpoint before it to roll back to; set"
            " train.save_interval_steps, or start anew with a lower optim.lr or other data (data.skip)"
        )
    chosen = run.store.choose(target)
    run.store.load(chosen, run.optimizer.state_shards())
    meta = chosen.meta
    run.optimizer.step_count = meta["optimizer_steps"]
    run.optimizer.after_load()
    plan = run.loader.plan
    first = int(plan.ids(meta["consumed_samples"], 1)[0])
    end = int(plan.ids(consumed_samples - 1, 1)[0]) + 1
    run.loader.plan = Plan(plan.segments, [*plan.skip, (first, end)])
    if run.mesh.is_main:
        record = RollbackRecord(target, [list(part) for part in run.loader.plan.skip], rollbacks)
        record.write(Path(run.config.train.run_dir))
    run.store.discard_after(target)
    return meta, (first, end)
