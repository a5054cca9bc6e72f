"""What lies in a directory of checkpoints, and which of it a load takes.

    root/latest                                  name of the newest checkpoint; replacing it is the commit
    root/step_00000123/                          complete: manifest.json lists every file with size and hash
    root/step_00000123.writing-<owner>.<n>/      being written, by all ranks
    root/step_00000123.{failed,deleting,replaced}-<owner>.<n>/      on its way out

The name says what a directory is; only a directory with a final name and a manifest is a checkpoint. Nothing is changed
here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.storage.durable import MANIFEST, Manifest
from megatron_fp4.storage.owner import Owner
from megatron_fp4.storage.patience import read_json

LATEST = "latest"
STATE = "state.json"
COMPLETE_NAME = re.compile(r"step_(\d{8,})")
TEMPORARY_NAME = re.compile(r"(step_\d{8,})\.(writing|failed|deleting|replaced)-(.+)\.\d+")


@dataclass(frozen=True)
class TemporaryDirectory:
    """A directory that is not a checkpoint yet, or no longer. checkpoint: the final name that belongs to it."""

    path: Path
    checkpoint: str
    stage: str
    owner: Owner


def step_name(step: int) -> str:
    """Name of a complete checkpoint's directory."""
    return f"step_{step:08d}"


def temporary_name(step: int, stage: str, owner: Owner, number: int) -> str:
    """Name of a directory that is not a checkpoint yet, or no longer. number: distinguishes those of one owner."""
    return f"{step_name(step)}.{stage}-{owner.tag}.{number}"


def temporary_directories(root: Path) -> Iterator[TemporaryDirectory]:
    """Every directory that is not a checkpoint yet, or no longer."""
    for entry in sorted(os.listdir(root)) if root.is_dir() else []:
        match = TEMPORARY_NAME.fullmatch(entry)
        owner = Owner.from_tag(match[3]) if match else None
        if match and owner:
            yield TemporaryDirectory(root / entry, match[1], match[2], owner)


def complete_steps(root: Path) -> list[int]:
    """Steps with a complete checkpoint, ascending. A directory without manifest is none."""
    return [step for step in present_steps(root) if (root / step_name(step) / MANIFEST).exists()]


def present_steps(root: Path) -> list[int]:
    """Steps with a directory under the final name, complete or damaged, ascending."""
    names = os.listdir(root) if root.is_dir() else []
    return sorted(int(match[1]) for match in map(COMPLETE_NAME.fullmatch, names) if match)


def named_by_latest(root: Path) -> int | None:
    """The step that `latest` names, whether or not that checkpoint is intact."""
    with suppress(OSError, UnicodeDecodeError):
        if match := COMPLETE_NAME.fullmatch((root / LATEST).read_text().strip()):
            return int(match[1])
    return None


def step_to_load(root: Path) -> int | None:
    """The step that a resume tries first, whether or not it is intact; None where there is nothing to go on from.

    Raises ValueError where there is none at all, and `latest` names one or a directory looks like one.
    """
    order, named = load_order(root), named_by_latest(root)
    if not order and named is not None:
        raise ValueError(
            f"{root / LATEST} names {step_name(named)}, and there is no checkpoint under {root}; bring it back, or"
            " remove that file to begin anew"
        )
    if not order and (strange := _strange_name(root)):
        raise ValueError(
            f"{root / strange} looks like a checkpoint and has no name of one ({step_name(200)} is one), and there is"
            " no other; give it its name back, or remove it to begin anew"
        )
    return order[0] if order else None


def _strange_name(root: Path) -> str | None:
    """A directory that looks like a checkpoint, by its name or its manifest, and has no name of one."""
    temporary = {one.path.name for one in temporary_directories(root)}
    names = sorted(set(os.listdir(root)) - temporary) if root.is_dir() else []
    return next((name for name in names if name.startswith("step_") or (root / name / MANIFEST).exists()), None)


def latest_step(root: Path) -> int | None:
    """What `latest` names if that is complete, else the highest complete step, else None."""
    steps, named = complete_steps(root), named_by_latest(root)
    return named if named in steps else (steps[-1] if steps else None)


def load_order(root: Path) -> list[int]:
    """Steps to try on a resume: what `latest` names, then lower ones, newest first.

    Higher ones than `latest` names were left by a run that was rolled back, or killed between rename and commit.
    """
    steps, named = present_steps(root), named_by_latest(root)
    if named is None or named not in steps:
        return steps[::-1]
    return [step for step in steps[::-1] if step <= named]


def read_state(directory: str | os.PathLike[str], pauses: Sequence[float] | None = None) -> dict[str, Any]:
    """The small state: {"step", "tokens", "score", "meta"}. pauses: see `read_patiently`.

    Raises ValueError naming the file if it is missing or damaged; UnreadableFile.
    """
    path = Path(directory) / STATE
    try:
        state = read_json(path, pauses)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    if not isinstance(state, dict) or not isinstance(state.get("meta"), dict) or type(state.get("step")) is not int:
        raise ValueError(f"{path} is damaged: not a JSON object with a step and meta")
    if missing := {"tokens", "score"} - state.keys():
        raise ValueError(f"{path} is damaged: no {', '.join(sorted(missing))}")
    for name in ("tokens", "score"):
        if not (state[name] is None or type(state[name]) in (int, float)):
            raise ValueError(f"{path} is damaged: {name} is {state[name]!r}, no number")
    return state


def check_step(directory: Path, manifest: Manifest, state: dict[str, Any]) -> None:
    """Raise ValueError if name, manifest and state of a checkpoint are not of one step.

    A directory that was renamed to something else, "best" for example, has no step in its name.
    """
    match = COMPLETE_NAME.fullmatch(directory.name)
    named = int(match[1]) if match else manifest.step
    if not named == manifest.step == state["step"]:
        raise ValueError(
            f"{directory} holds the checkpoint of step {manifest.step} by its {MANIFEST} and of step {state['step']} by"
            f" its {STATE}: it was renamed or mixed; give it its own name back"
        )
