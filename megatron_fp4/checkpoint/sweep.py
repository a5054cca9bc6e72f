"""Removing: checkpoints that no rule keeps, and what ended runs left behind.

One idea: what is deleted first gets a name under which nobody takes it for a checkpoint, so a kill in between leaves
only rubbish, which the next start sweeps up.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import LATEST, complete_steps, passing, passing_name, read_state, step_name
from megatron_fp4.checkpoint.retention import Saved, steps_to_delete
from megatron_fp4.storage.owner import Owner

log = logging.getLogger(__name__)

STALE_SECONDS = 3600.0  # a writer on another host that touched nothing for so long is gone
TEMPORARY_SECONDS = 60.0  # a new `latest` exists under its temporary name for milliseconds


def remove_checkpoint(root: Path, step: int, number: int) -> None:
    """Delete a checkpoint such that a kill in between leaves nothing that looks like one."""
    doomed = root / passing_name(step, "deleting", Owner.me(), number)
    os.rename(root / step_name(step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def retain(root: Path, newest: int, number: int, config: CheckpointConfig) -> None:
    """Delete what no rule keeps. Trouble is only logged: it must not fail the save that was just committed."""
    try:
        saved = []
        for step in complete_steps(root):
            try:
                state = read_state(root / step_name(step))
            except ValueError:  # damaged: only its age counts
                state = {}
            saved.append(Saved(step, state.get("tokens"), state.get("score")))
        for step in steps_to_delete(saved, newest, config):
            remove_checkpoint(root, step, number)
    except OSError as error:
        log.warning("old checkpoints under %s were not removed: %s", root, error)


def sweep(root: Path) -> list[str]:
    """Remove what ended runs left behind (rank 0, at start); never the directory of a live writer. Returns the names.

    A checkpoint that was moved aside for its replacement, which then never came, gets its name back.
    """
    removed = []
    for path in root.glob(f"{LATEST}.tmp-*"):
        if time.time() - path.stat().st_mtime > TEMPORARY_SECONDS:
            path.unlink()
    for path, name, stage, owner in list(passing(root)):
        if stage in ("writing", "replaced") and owner.lives(_age_seconds(path), STALE_SECONDS):
            continue
        if stage == "replaced" and not (root / name).exists():
            os.rename(path, root / name)
            continue
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path.name)
    return removed


def sweep_failed(root: Path) -> None:
    """Free the disk space of given-up saves of this process."""
    for path, _, stage, owner in list(passing(root)):
        if stage == "failed" and owner == Owner.me():
            shutil.rmtree(path, ignore_errors=True)


def _age_seconds(path: Path) -> float:
    """Since anything in the directory was last written."""
    times = [path.stat().st_mtime]
    with suppress(OSError):
        times += [entry.stat().st_mtime for entry in os.scandir(path)]
    return time.time() - max(times)
