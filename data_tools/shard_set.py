"""Several shard sets (train, held-out) written side by side from one ordered stream, so that a kill costs little.

All splits roll to their next shard at the same batch of input, and then one small progress file is
replaced: finished shards, counters, input position. A restart drops what the progress does not list and goes on from
its position; shard borders depend on the input only, so the result is the same bytes as without the kill.

Nothing is overwritten: a folder with shards of another job, or of a finished one, is refused, and so is a second
process that writes to the same place.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.records import Position
from megatron_fp4.data.shards.manifest import MANIFEST, PROGRESS, FileDigest, commit, digest_file, write_json
from megatron_fp4.data.shards.writer import ShardWriter

SEARCHED_LEVELS = 4
"""How deep other shard sets are looked for inside an output."""


class SplitWriter:
    """Writes `folders` (split name -> directory); use it in a `with`. `job` identifies input and options.

    Raises ValueError where the folders hold anything but an unfinished run of the same job, or another process writes.
    """

    def __init__(self, root: Path, folders: dict[str, Path], dtype: np.dtype, job: dict[str, Any]) -> None:
        self.folders = folders
        self.dtype = dtype
        self.job = job
        self.counters: Counter[str] = Counter()
        self.position = Position(0, 0)
        self.shards: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
        self._progress = root / PROGRESS
        self._open: dict[str, tuple[ShardWriter, FileDigest]] = {}
        for folder in (root, *folders.values()):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = _Lock(root)
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise

    def _begin(self) -> None:
        if not self._progress.exists():
            _refuse_full(self.folders.values())
            self._save()
            return
        state = json.loads(self._progress.read_text())
        if any(state["shards"].values()):  # without any, there is nothing to lose: another job may begin here
            check_same_job(state["job"], self.job, str(self._progress))
            self.position = Position(*state["position"])
            self.counters = Counter(state["counters"])
            self.shards = state["shards"]
        self._drop_unlisted()
        self._save()

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for writer, _ in self._open.values():
            writer.abort()
        self._lock.release()

    def add(self, name: str, tokens: NDArray, lengths: NDArray) -> None:
        if not len(lengths):
            return
        if name not in self._open:
            digest = FileDigest()
            prefix = self.folders[name] / f"shard_{len(self.shards[name]):05d}"
            self._open[name] = (ShardWriter(prefix, self.dtype, digest.update), digest)
        self._open[name][0].add_documents(tokens, lengths)

    def end_batch(self, position: Position, shard_tokens: int) -> None:
        """The input up to `position` is in; roll when a split's shard has reached `shard_tokens`."""
        self.position = position
        if any(writer.num_tokens >= shard_tokens for writer, _ in self._open.values()):
            self._roll()

    def finish(self, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Close the last shards, commit every split, remove the progress file. Returns the manifests.

        Raises ValueError if no document came: the reader's counts say what became of the input.
        """
        self._roll()
        if not any(self.shards.values()):
            counts = ", ".join(f"{name} {count:,}" for name, count in sorted(self.counters.items()) if count)
            raise ValueError(
                f"no document came out of the input ({counts or 'it is empty'}), so nothing is committed; look at the"
                " files, --text-key and the policies"
            )
        facts = {**facts, "dtype": str(self.dtype), "counters": dict(self.counters), "job": self.job}
        manifests = {name: commit(folder, self.shards[name], **facts) for name, folder in self.folders.items()}
        self._progress.unlink()
        return manifests

    def _roll(self) -> None:
        for name, (writer, digest) in self._open.items():
            writer.close()
            self.shards[name].append(
                {
                    "name": writer.prefix.name,
                    "num_documents": writer.num_documents,
                    "num_tokens": writer.num_tokens,
                    "max_token_id": writer.max_token_id,
                    "files": {"bin": digest.result(), "idx": digest_file(Path(f"{writer.prefix}.idx"))},
                }
            )
        self._open = {}
        self._save()

    def _save(self) -> None:
        state = {
            "job": self.job,
            "position": list(self.position),
            "counters": self.counters,
            "shards": self.shards,
        }
        write_json(self._progress, state)

    def _drop_unlisted(self) -> None:
        for name, folder in self.folders.items():
            listed = {entry["name"] for entry in self.shards[name]}
            for path in _shard_files(folder):
                if path.name.split(".")[0] not in listed or path.suffix == ".tmp":
                    path.unlink()


class _Lock:
    """The right to write under `root`, of one process; the kernel takes it back if that dies."""

    def __init__(self, root: Path) -> None:
        self._path = root / ".lock"
        self._file = open(self._path, "w")  # noqa: SIM115 - closed by release()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"another process is writing to {root}; wait for it, or choose another --output") from None

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()


def _shard_files(folder: Path) -> list[Path]:
    return [
        path for path in folder.glob("shard_*") if re.fullmatch(r"shard_\d{5,}\.(bin|idx|hashes)(\.tmp)?", path.name)
    ]


def _refuse_full(folders: Iterable[Path]) -> None:
    for folder in folders:
        files = [path.name for path in (folder / MANIFEST, *_shard_files(folder)) if path.exists()]
        if files:
            raise ValueError(
                f"{folder} already holds {files[0]} of another job; choose another --output, or --restart to delete it"
            )


def finished(root: Path, folders: dict[str, Path], job: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The manifests, if this job was done before; None if it was not begun or not finished. ValueError for another."""
    if (root / PROGRESS).exists() or not all((folder / MANIFEST).exists() for folder in folders.values()):
        return None
    manifests = {name: json.loads((folder / MANIFEST).read_text()) for name, folder in folders.items()}
    for name, manifest in manifests.items():
        check_same_job(manifest.get("job", {}), job, str(folders[name]))
    print(f"already complete: {root}")
    return manifests


def check_not_nested(folders: dict[str, Path]) -> None:
    """Refuse an output around or inside another shard set: a glob or a directory would then read both.

    Also one that is not finished, whose progress file may lie in the folder around its splits.
    """
    own = {folder.resolve() for folder in folders.values()}
    for folder in own:
        around = [parent for parent in folder.parents if (parent / MANIFEST).is_file()]
        inside = [
            path.parent
            for depth in range(1, SEARCHED_LEVELS + 1)
            for name in (MANIFEST, PROGRESS)
            for path in folder.glob("/".join([*"*" * depth, name]))
        ]
        for other in (*around, *inside):
            if other not in own:
                raise ValueError(
                    f"{folder} would {'lie inside' if other in around else 'contain'} the shard set {other}; choose"
                    " another --output, beside it"
                )


def check_same_job(stored: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for key in sorted(set(stored) | set(wanted)):
        if stored.get(key) != wanted.get(key):
            raise ValueError(
                f"{where} belongs to another job: its {key} is {stored.get(key)}, this command has "
                f"{wanted.get(key)}. Choose another --output, or --restart to delete it."
            )


def remove_sets(root: Path, folders: dict[str, Path]) -> None:
    """Delete earlier results of these splits: manifests first, so that no half set looks whole."""
    for folder in folders.values():
        (folder / MANIFEST).unlink(missing_ok=True)
    (root / PROGRESS).unlink(missing_ok=True)
    for folder in folders.values():
        for path in _shard_files(folder):
            path.unlink()
