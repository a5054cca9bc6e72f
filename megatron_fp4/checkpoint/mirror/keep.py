"""What is removed from the store: checkpoints that no rule keeps, those of a rollback, and the rest of cut uploads.

The manifest goes first, so that a kill in between leaves only what nobody takes for a checkpoint. The holder of the
lease is the only writer: what is incomplete and older than the newest complete checkpoint was left by a killed launch.

A rollback is on the disk before it is in the store. So names that are to go are written down first, in DROPPED beside
the checkpoints: a launch that finds the file does not resume from them, and removes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import STATE, present_steps, step_name
from megatron_fp4.checkpoint.mirror.contents import MirrorContents, MirroredName, local_name
from megatron_fp4.checkpoint.retention import KeptStep, steps_to_delete
from megatron_fp4.storage.durable import MANIFEST, write_durably
from megatron_fp4.storage.patience import read_json
from megatron_fp4.storage.remote.client import Remote

DROPPED = "mirror_dropped.json"


def remove_from_store(remote: Remote, name: MirroredName, files: Iterable[str]) -> None:
    """Remove a checkpoint, complete or not. Raises StoreError."""
    remote.delete([f"{name}/{MANIFEST}"])
    remote.delete(f"{name}/{file}" for file in files if file != MANIFEST)


def read_kept(remote: Remote, name: MirroredName) -> KeptStep:
    """What the rules judge a mirrored checkpoint by. Raises StoreError."""
    with suppress(FileNotFoundError, ValueError, TypeError, AttributeError):
        state = json.loads(remote.read(f"{name}/{STATE}"))
        return KeptStep(name.step, state.get("tokens"), state.get("score"))
    return KeptStep(name.step)


def rules_of(config: CheckpointConfig) -> CheckpointConfig:
    """The rules of the store: those of the disk, with as many newest ones as `mirror_keep_last` says."""
    return replace(config, keep_last=config.mirror_keep_last or config.keep_last)


def names_to_remove(
    contents: MirrorContents, kept: Mapping[MirroredName, KeptStep], newest: MirroredName, config: CheckpointConfig
) -> list[MirroredName]:
    """What no rule keeps, of the steps up to `newest`; other contents of a step that is there; remains of uploads.

    config: the store's, see `rules_of`.
    """
    by_step = {name.step: name for name in contents.complete} | {newest.step: newest}
    doomed = steps_to_delete([kept[name] for name in by_step.values()], newest.step, config)
    return [
        name
        for name, files in contents.files.items()
        if name.step <= newest.step and (MANIFEST not in files or name != by_step[name.step] or name.step in doomed)
    ]


def note_dropped(root: Path, step: int) -> set[str]:
    """Write down that the checkpoints above `step`, which are about to be removed from the disk, end in the store too.

    Returns all names that are to go. Raises OSError.
    """
    names = set(dropped(root)) | {str(name) for name in _on_disk(root) if name.step > step}
    if names:
        write_durably(root / DROPPED, json.dumps(sorted(names)).encode())
    return names


def _on_disk(root: Path) -> set[MirroredName]:
    names = set()
    for step in present_steps(root):
        with suppress(OSError, ValueError):
            names.add(local_name(root / step_name(step)))
    return names


def dropped(root: Path) -> list[str]:
    """The names that are to go; none where there is no such file, or it is damaged."""
    with suppress(FileNotFoundError, ValueError):
        names = read_json(root / DROPPED)
        return [str(name) for name in names] if isinstance(names, list) else []
    return []


def remove_dropped(remote: Remote, root: Path, contents: MirrorContents) -> set[MirroredName]:
    """Do what `note_dropped` has noted; the names that were removed. Raises StoreError, OSError."""
    noted = dropped(root)
    names = {name for name in map(MirroredName.parse, noted) if name is not None}
    for name in names & contents.files.keys():
        remove_from_store(remote, name, contents.files[name])
    if noted and not names & _on_disk(root) and dropped(root) == noted:
        (root / DROPPED).unlink(missing_ok=True)
    return names
