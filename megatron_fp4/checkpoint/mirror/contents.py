"""What checkpoints lie under a prefix of an object store, and which of them a load takes.

A checkpoint is complete if its manifest is there, because that is sent last and removed first. Nothing is changed here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_fp4.checkpoint.directory import LATEST, step_name
from megatron_fp4.storage.durable import MANIFEST
from megatron_fp4.storage.patience import read_patiently
from megatron_fp4.storage.remote.client import Remote

NAME = re.compile(r"step_(\d{8,})\.([0-9a-f]{16})")


@dataclass(frozen=True, order=True)
class MirroredName:
    """The name of a checkpoint in a store. digest: xxh3-64 of its manifest.json."""

    step: int
    digest: str

    def __str__(self) -> str:
        return f"{step_name(self.step)}.{self.digest}"

    @staticmethod
    def parse(text: str) -> MirroredName | None:
        match = NAME.fullmatch(text)
        return MirroredName(int(match[1]), match[2]) if match else None


@dataclass(frozen=True)
class MirrorContents:
    """What was listed. files: of each checkpoint, complete or not, the sizes by name. latest: what `latest` names."""

    files: Mapping[MirroredName, Mapping[str, int]]
    latest: MirroredName | None

    @property
    def complete(self) -> list[MirroredName]:
        """Ascending by step; of several of one step the one that `latest` names is the last."""
        names = [name for name, files in self.files.items() if MANIFEST in files]
        return sorted(names, key=lambda name: (name.step, name == self.latest, name.digest))

    def order(self, without: Collection[str] = ()) -> list[MirroredName]:
        """Checkpoints to try on a resume: what `latest` names, then lower ones, newest first, one of each step.

        without: names that are to be removed, and count no more. Where `latest` names none that is there, the highest
        complete one is the first.
        """
        newest_first = [name for name in self.complete[::-1] if str(name) not in without]
        by_step = {name.step: name for name in newest_first[::-1]}
        names = [by_step[step] for step in sorted(by_step, reverse=True)]
        if self.latest not in newest_first:
            return names
        assert self.latest is not None
        return [name for name in names if name.step <= self.latest.step]


def look_at_mirror(remote: Remote) -> MirrorContents:
    """One listing, and `latest`. Raises StoreError."""
    files: dict[MirroredName, dict[str, int]] = {}
    for one in remote.entries():
        folder, _, file = one.key.partition("/")
        if file and (name := MirroredName.parse(folder)):
            files.setdefault(name, {})[file] = one.num_bytes
    return MirrorContents(files, named_by_latest(remote)[0])


def named_by_latest(remote: Remote) -> tuple[MirroredName | None, str]:
    """What `latest` names, None if nothing; and the version of that object, "" if there is none."""
    with suppress(FileNotFoundError):
        text, version = remote.read_version(LATEST)
        return MirroredName.parse(text.decode(errors="replace").strip()), version
    return None, ""


def local_name(directory: Path) -> MirroredName:
    """The name that a checkpoint on the disk has in a store. Raises FileNotFoundError, UnreadableFile."""
    path = directory / MANIFEST
    content = read_patiently(path.read_bytes, path)
    step = int(directory.name.removeprefix("step_"))
    return MirroredName(step, digest_of(content))


def digest_of(manifest: bytes) -> str:
    """What stands behind the step in a name."""
    return xxhash.xxh3_64_hexdigest(manifest)
