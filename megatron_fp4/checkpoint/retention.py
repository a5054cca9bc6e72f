"""Which checkpoints stay, and removing the others and what ended runs left behind.

What stays is a pure function of (step, tokens, score) of those that exist: stateless, so that a resumed run decides
like an uninterrupted one. What is deleted first gets a name under which nobody takes it for a checkpoint, so a kill in
between leaves only rubbish, which the next start sweeps up.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import (
    LATEST,
    complete_steps,
    present_steps,
    read_state,
    step_name,
    temporary_directories,
    temporary_name,
)
from megatron_fp4.storage.durable import fsync_directory, write_durably
from megatron_fp4.storage.lock import holds
from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.patience import UnreadableFile

log = logging.getLogger(__name__)

STALE_SECONDS = 3600.0  # a writer on another host that touched nothing for so long is gone
TEMPORARY_SECONDS = 60.0  # a new `latest` exists under its temporary name for milliseconds


@dataclass(frozen=True)
class KeptStep:
    """A checkpoint that exists.

    tokens: consumed until then. score: the lower the better (held-out loss); None: not evaluated.
    """

    step: int
    tokens: int | None = None
    score: float | None = None


def steps_to_delete(existing: Sequence[KeptStep], newest: int, config: CheckpointConfig) -> list[int]:
    """Steps that no rule keeps. Steps above `newest` (of a run that was rolled back) are left alone and not counted."""
    past = sorted((one for one in existing if one.step <= newest), key=lambda one: one.step)
    kept = {one.step for one in past[-config.keep_last :]}
    if config.keep_every_tokens:
        firsts: dict[int, int] = {}
        for one in past:
            if one.tokens is not None and one.tokens >= config.keep_every_tokens:
                firsts.setdefault(one.tokens // config.keep_every_tokens, one.step)
        kept |= set(firsts.values())
    scored = sorted((one.score, one.step) for one in past if one.score is not None and one.score == one.score)
    kept |= {step for _, step in scored[: config.keep_best]}
    return [one.step for one in past if one.step not in kept]


def retain(root: Path, newest: int, number: int, config: CheckpointConfig) -> None:
    """Delete what no rule keeps. Trouble is only logged: it must not fail the save that was just committed."""
    try:
        existing = []
        for step in complete_steps(root):
            try:
                state = read_state(root / step_name(step), pauses=())
            except UnreadableFile as error:  # it may be the best one: the next save decides again
                log.warning("old checkpoints under %s are not removed yet: %s", root, error)
                return
            except ValueError:  # damaged: only its age counts
                state = {}
            existing.append(KeptStep(step, state.get("tokens"), state.get("score")))
        for step in steps_to_delete(existing, newest, config):
            remove_checkpoint(root, step, number)
    except OSError as error:
        log.warning("old checkpoints under %s were not removed: %s", root, error)


def remove_checkpoint(root: Path, step: int, number: int) -> None:
    """Delete a checkpoint such that a kill in between leaves nothing that looks like one."""
    doomed = root / temporary_name(step, "deleting", Owner.me(), number)
    os.rename(root / step_name(step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def discard_after(root: Path, step: int, number: int) -> None:
    """Make `latest` name the checkpoint of `step`, and delete those above it. Raises OSError."""
    set_latest(root, step)
    for later in [one for one in present_steps(root) if one > step]:
        remove_checkpoint(root, later, number)


def set_aside_after(root: Path, step: int) -> Path | None:
    """Make `latest` name the checkpoint of `step`, and move those above it into a folder of their own under `root`.

    Nothing looks for a checkpoint there, and nothing deletes it. Returns the folder; None where there is nothing above.
    `latest` comes first, so that a kill in between leaves what `load_order` passes over. Raises OSError.
    """
    later = [one for one in present_steps(root) if one > step]
    set_latest(root, step)
    if not later:
        return None
    number = next(n for n in itertools.count(1) if not (root / f"set_aside_{n:03}").exists())
    aside = root / f"set_aside_{number:03}"
    aside.mkdir()
    for one in later:
        os.rename(root / step_name(one), aside / step_name(one))
    fsync_directory(aside)
    fsync_directory(root)
    return aside


def set_latest(root: Path, step: int) -> None:
    """Make `latest` name the checkpoint of `step`."""
    write_durably(root / LATEST, f"{step_name(step)}\n".encode())
    fsync_directory(root)


def sweep(root: Path) -> list[str]:
    """Remove what ended runs left behind (rank 0, at start); never the directory of a live writer. Returns the names.

    A process that holds the lock of the run directory, in which `root` lies, is the only one that may write there.
    Without it a writer on another host is alive until it has touched nothing for STALE_SECONDS. A checkpoint that was
    moved aside for its replacement, which then never came, gets its name back.
    """
    removed = []
    stale_seconds = -math.inf if holds(root.parent) else STALE_SECONDS
    for path in root.glob(f"{LATEST}.tmp-*"):
        with _logged(path):
            if time.time() - path.stat().st_mtime > TEMPORARY_SECONDS:
                path.unlink()
    for one in list(temporary_directories(root)):
        with _logged(one.path):
            if one.stage in ("writing", "replaced") and one.owner.lives(_age_seconds(one.path), stale_seconds):
                continue
            if one.stage == "replaced" and not (root / one.checkpoint).exists():
                os.rename(one.path, root / one.checkpoint)
                continue
            shutil.rmtree(one.path)
            removed.append(one.path.name)
    return removed


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What cannot be swept is said, and no reason to stop: whoever only reads may not write there."""
    try:
        yield
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        log.warning("%s, left by a run that ended, is not removed: %s", path, error)


def sweep_failed(root: Path) -> None:
    """Free the disk space of given-up saves of this process."""
    for one in list(temporary_directories(root)):
        if one.stage == "failed" and one.owner == Owner.me():
            shutil.rmtree(one.path, ignore_errors=True)


def _age_seconds(path: Path) -> float:
    """How long ago anything in the directory was last written."""
    times = [path.stat().st_mtime]
    with suppress(OSError):
        times += [entry.stat().st_mtime for entry in os.scandir(path)]
    return time.time() - max(times)
