"""Several shard sets (train, held-out) written side by side from one ordered stream, so that a kill costs little.

One idea: all splits roll to their next shard at the same batch of input, and then one small progress file is
replaced: finished shards, counters, input position. A restart drops what the progress does not list and goes on from
its position; shard borders depend on the input only, so the result is the same bytes as without the kill.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.documents import Position
from megatron_fp4.data.manifest import MANIFEST, PROGRESS, FileDigest, commit, digest_file, write_json
from megatron_fp4.data.shard import ShardWriter


class SplitWriter:
    """Writes `folders` (split name -> directory). `job` identifies input and options; another job is refused."""

    def __init__(self, root: Path, folders: dict[str, Path], dtype: np.dtype, job: dict[str, Any]) -> None:
        self.folders = folders
        self.dtype = dtype
        self.job = job
        self.counters: Counter[str] = Counter()
        self.position = Position(0, 0)
        self.shards: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
        self._progress = root / PROGRESS
        self._open: dict[str, tuple[ShardWriter, FileDigest]] = {}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        self._restore()
        self._drop_unlisted()
        if not self._progress.exists():
            self._save()

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
        """Close the last shards, commit every split, remove the progress file. Returns the manifests."""
        self._roll()
        facts = {**facts, "dtype": str(self.dtype), "counters": dict(self.counters), "job": self.job}
        made = {name: commit(folder, self.shards[name], **facts) for name, folder in self.folders.items()}
        self._progress.unlink()
        return made

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

    def _restore(self) -> None:
        if not self._progress.exists():
            return
        state = json.loads(self._progress.read_text())
        check_same_job(state["job"], self.job, str(self._progress))
        self.position = Position(*state["position"])
        self.counters = Counter(state["counters"])
        self.shards = state["shards"]

    def _drop_unlisted(self) -> None:
        for name, folder in self.folders.items():
            listed = {entry["name"] for entry in self.shards[name]}
            for path in folder.glob("shard_*"):
                if path.name.split(".")[0] not in listed or path.suffix == ".tmp":
                    path.unlink()


def check_same_job(stored: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for key in sorted(set(stored) | set(wanted)):
        if stored.get(key) != wanted.get(key):
            raise ValueError(
                f"{where} belongs to another tokenization: its {key} is {stored.get(key)}, this command has "
                f"{wanted.get(key)}. Choose another --output, or --restart to delete it."
            )


def remove_sets(root: Path, folders: dict[str, Path]) -> None:
    """Delete earlier results of these splits: manifests first, so that no half set looks whole."""
    for folder in folders.values():
        (folder / MANIFEST).unlink(missing_ok=True)
    (root / PROGRESS).unlink(missing_ok=True)
    for folder in folders.values():
        for path in folder.glob("shard_*"):
            path.unlink()
