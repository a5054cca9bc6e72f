"""Back to an earlier checkpoint by hand, while nothing runs: what came later is set aside, and nothing is deleted.

The next start of the same command goes on from there as any resume does: it drops the records of later steps, voids
their lines in the data ledger, and reads the same samples again. Who wants other samples, or another learning rate,
says so in that command; what to type for the samples is worked out here.

Not here: the rollback of the spike ladder, within a run (faults/rollback.py).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint import offline
from megatron_fp4.checkpoint.directory import complete_steps, latest_step, read_state, step_name
from megatron_fp4.checkpoint.mirror.keep import note_dropped
from megatron_fp4.checkpoint.mirror.state import MirrorState
from megatron_fp4.checkpoint.retention import set_aside_after
from megatron_fp4.data.order.plan import Plan
from megatron_fp4.storage.lock import RunLock
from megatron_fp4.train.telemetry.metrics import METRICS_FILE, JsonlSink
from megatron_fp4.train.telemetry.operator.events import Events


@dataclass(frozen=True)
class Rewound:
    """What `rewind` did. newest: the checkpoint that a resume took before. aside: where the later ones lie, None where
    there were none. skip: sample ids [first, end) that were read since, None where that is not known."""

    step: int
    newest: int
    aside: Path | None
    skip: tuple[int, int] | None


def rewind(run_dir: Path, step: int) -> Rewound:
    """Make checkpoint `step` the one that the next start takes. Raises ValueError for what is not there or damaged,
    RunLocked where a launch lives, OSError."""
    root = run_dir / "checkpoints"
    complete = complete_steps(root)
    if step not in complete:
        listed = ", ".join(map(str, complete)) or "none"
        raise ValueError(f"{run_dir} has no complete checkpoint of step {step}; those of steps {listed} are there")
    if problems := offline.verify(root / step_name(step)):
        raise ValueError(f"checkpoint {step} is damaged, nothing was changed: {problems[0]}")
    lock = RunLock(run_dir)
    lock.acquire()
    try:
        newest = latest_step(root)
        assert newest is not None
        skip = _read_since(root, step, newest)
        if MirrorState.read(run_dir):  # the next start removes them from the mirror
            note_dropped(root, step)
        aside = set_aside_after(root, step)
        metrics = run_dir / METRICS_FILE
        if aside is not None and metrics.exists():
            shutil.copy2(metrics, aside / METRICS_FILE)
        JsonlSink(metrics, resume_step=step).close()
        Events(run_dir).add("rewind", step, f"rewound by hand from checkpoint {newest} to checkpoint {step}")
    finally:
        lock.release()
    return Rewound(step, newest, aside, skip)


def _read_since(root: Path, step: int, newest: int) -> tuple[int, int] | None:
    """Ids of the samples between two checkpoints; None where the newer one is not read, or nothing lies between."""
    try:
        before, after = (_first_id(read_state(root / step_name(one))["meta"]) for one in (step, newest))
    except (ValueError, KeyError):
        return None
    return (before, after) if after > before else None


def _first_id(meta: dict[str, Any]) -> int:
    return int(Plan.from_json(meta["data"]["plan"]).id_of(meta["consumed_samples"]))
