"""Which documents did step N see? Recomputed from the plan, and proved by a hash that the run logged.

The answer is a pure function of (config, plan, step's samples), so nothing big is logged: one line per step
with a 63-bit hash of the step's tokens. A hash adds up over samples (modulo 2^63), so each data-parallel rank hashes
its own rows and the sum is the same for every layout.

`<run>/ledger.jsonl`: a line {"config", "plan", "sources", "held_out", "tokenizers", "step", "first_sample"} at each
(re)start, which voids later steps of earlier starts, and a line {"step", "first_sample", "num_samples", "hash",
"phase"} per step (the data phase of its last sample). One rank writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_fp4.data.batch import Batch
from megatron_fp4.data.config import config_from_dict
from megatron_fp4.data.evaluation import EvalLoader
from megatron_fp4.data.loader import Loader, open_streams
from megatron_fp4.data.order.plan import Plan
from megatron_fp4.data.shards.documents import ShardedDocuments
from megatron_fp4.storage.append import AppendFile, read_values

LEDGER = "ledger.jsonl"
_MODULUS = 1 << 63


def step_hash(batch: Batch) -> int:
    """Hash of a rank's rows: sum over samples of blake2b(sample id, its S + 1 token ids), modulo 2^63."""
    ids = np.concatenate([batch.tokens.numpy(), batch.labels.numpy()[:, -1:]], axis=1).astype("<i8")
    total = 0
    for sample_id, row in zip(batch.sample_ids.tolist(), ids, strict=True):
        content = hashlib.blake2b(sample_id.to_bytes(8, "little", signed=True), digest_size=8)
        content.update(row.data)
        total += int.from_bytes(content.digest(), "little")
    return total % _MODULUS


def combine_hashes(hashes: Iterable[int]) -> int:
    """The step's hash from those of all data-parallel ranks, in any order."""
    return sum(hashes) % _MODULUS


@dataclass(frozen=True)
class DataIdentity:
    """What a run reads, by content, wherever it lies.

    sources, held_out: name -> fingerprint of the documents. tokenizers: fingerprints that the sources' manifests name,
    sorted; empty for shards without a manifest, and in the ledgers of older runs.
    """

    sources: dict[str, str]
    held_out: dict[str, str]
    tokenizers: list[str]

    @staticmethod
    def of_start(start: dict[str, Any]) -> DataIdentity:
        """What a start wrote. Raises ValueError where it did not."""
        sources: Any = start.get("sources")
        identity = DataIdentity(sources, start.get("held_out", {}), start.get("tokenizers", []))
        contents = identity.sources, identity.held_out
        if not (all(isinstance(one, dict) for one in contents) and isinstance(identity.tokenizers, list)):
            raise ValueError(f"the start at step {start['step']} does not say what was read")
        return identity


class LedgerWriter:
    """Appends to a run's ledger; flushed line by line."""

    def __init__(
        self,
        run_folder: str | Path,
        loader: Loader,
        *,
        step: int,
        first_sample: int,
        evaluations: Iterable[EvalLoader] = (),
    ) -> None:
        self._path = Path(run_folder) / LEDGER
        self._drop_half_line()
        self._lines = AppendFile(self._path)
        self._plan = loader.plan
        documents = {name: stream.documents for name, stream in loader.streams.items()}
        start = {"step": step, "first_sample": first_sample, "config": _absolute(dataclasses.asdict(loader.config))}
        identity = DataIdentity(
            sources={name: one.fingerprint for name, one in documents.items()},
            held_out={one.name: one.fingerprint for one in evaluations},
            tokenizers=sorted(
                {name for one in documents.values() if isinstance(one, ShardedDocuments) for name in one.tokenizers}
            ),
        )
        self._lines.add({**start, "plan": loader.plan.to_json(), **dataclasses.asdict(identity)})

    def add(self, step: int, first_sample: int, num_samples: int, hash_of_step: int) -> None:
        phase = self._plan.segments[self._plan.segment_of(self._plan.id_of(first_sample + num_samples - 1))].phase
        line = {"step": step, "first_sample": first_sample, "num_samples": num_samples, "hash": hash_of_step}
        self._lines.add({**line, "phase": phase})

    def _drop_half_line(self) -> None:
        """What a killed run may have left at the end."""
        if self._path.is_file():
            data = self._path.read_bytes()
            if not data.endswith(b"\n"):
                os.truncate(self._path, data.rfind(b"\n") + 1)

    def close(self) -> None:
        self._lines.close()


def _absolute(config: dict[str, Any]) -> dict[str, Any]:
    """The ledger may be read from another working directory than the run's."""
    for item in (*config["sources"], *config["evaluation"]):
        item["paths"] = [os.path.abspath(path) for path in item["paths"]]
    return config


class LoggedStep(NamedTuple):
    """What the run says about a step, and the data settings it ran under."""

    step: int
    first_sample: int
    num_samples: int
    hash: int
    start: dict[str, Any]


def read_step(run_folder: str | Path, step: int) -> LoggedStep:
    """The line of `step` that counts: the last one, unless a later restart began at or before it."""
    start: dict[str, Any] = {}
    logged: LoggedStep | None = None
    last = -1
    for line in _lines(run_folder):
        if "config" in line:
            start, last = line, line["step"] - 1
            logged = None if logged is not None and line["step"] <= step else logged
            continue
        last = line["step"]
        if line["step"] == step:
            logged = LoggedStep(step, line["first_sample"], line["num_samples"], line["hash"], start)
    if logged is None:
        raise ValueError(f"{Path(run_folder) / LEDGER} has no step {step}; its last step is {last}")
    return logged


def _lines(run_folder: str | Path, having: bytes = b"") -> Iterator[dict[str, Any]]:
    """The objects of the lines in which the text `having` occurs."""
    path = Path(run_folder) / LEDGER
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the directory of a run that wrote a ledger")
    yield from read_values(path, having)


def last_start(run_folder: str | Path) -> dict[str, Any]:
    """The data settings of a run's latest (re)start."""
    start = next((line for line in reversed(list(_lines(run_folder, b'"config"'))) if "config" in line), None)
    if start is None:
        raise ValueError(f"{Path(run_folder) / LEDGER} is empty: the run has not started")
    return start


def read_identity(run_folder: str | Path) -> DataIdentity | None:
    """What a run read, at all its (re)starts whose steps count; None where no ledger says it.

    A resume may take other sources (`train.resume_allow`), of which the settings of the last start know nothing.
    """
    starts: list[dict[str, Any]] = []
    try:
        for line in (line for line in _lines(run_folder, b'"config"') if "config" in line):
            starts = [*(start for start in starts if start["step"] < line["step"]), line]
        every = [DataIdentity.of_start(start) for start in starts]
    except (ValueError, FileNotFoundError):
        return None
    if not every:
        return None
    sources = {name: content for one in every for name, content in one.sources.items()}
    tokenizers = sorted({name for one in every for name in one.tokenizers})
    return DataIdentity(sources, every[-1].held_out, tokenizers)


def reopen(start: dict[str, Any], tokenizer_fingerprint: str | None = None) -> Loader:
    """A loader that gives whole steps (data parallel 1).

    Raises ValueError if a source changed since the run, or was made with another tokenizer than the one named.
    """
    config = config_from_dict(start["config"])
    streams = open_streams(config, tokenizer_fingerprint=tokenizer_fingerprint)
    for name, stream in streams.items():
        saved = start["sources"].get(name)
        if saved != stream.documents.fingerprint:
            raise ValueError(
                f"data source {name!r} changed since the run: its content was {saved}, now it is "
                f"{stream.documents.fingerprint}; the ledger cannot be recomputed from other data"
            )
    return Loader(config, streams, Plan.from_json(start["plan"]), micro_batch=1, dp_rank=0, dp_size=1)


def replay(loader: Loader, logged: LoggedStep) -> Batch:
    """The batch of a logged step, all samples, in global order. ValueError if its hash is not the logged one."""
    batch = loader.batch(logged.first_sample, logged.num_samples)
    actual = step_hash(batch)
    if actual != logged.hash:
        raise ValueError(
            f"step {logged.step}: the run logged hash {logged.hash}, the shards give {actual}. The data under the run "
            "changed, or the run did not train on what its config says."
        )
    return batch


def ledger(loader: Loader, first_sample: int, num_samples: int) -> list[dict[str, Any]]:
    """One row per piece of each sample of a step: sample_id, source, epoch, shard, document, offset, length."""
    origins = loader.origins(first_sample, num_samples)
    return [
        {"sample_id": origin.sample_id, **piece._asdict()} for origin in origins for piece in loader.describe(origin)
    ]
