"""Look at checkpoints without a model, a job or torch.distributed: list, verify, read, average, thin out.

A checkpoint is logical tensors, so one process can read any tensor whole whatever wrote it. For the same reason there
is no conversion between layouts: every layout reads every checkpoint. What remains of "convert" is
`extract`: some kinds of tensors (the masters for publishing) as a checkpoint of one file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.dcp import ShardLoadPlanner, StoredTensor
from megatron_fp4.checkpoint.directory import STATE, latest_step, read_state, step_name
from megatron_fp4.checkpoint.save import SaveStatus
from megatron_fp4.checkpoint.store import CheckpointStore
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.storage.durable import problem_of, read_manifest

EVERY_CHECKPOINT = 1 << 30
"""A `keep_last` that deletes nothing: what else is in the output directory stays."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored logical tensor. key: "<kind>/<name>". num_pieces: rectangles in which it was written."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_pieces: int

    @property
    def kind(self) -> str:
        return self.key.split("/", 1)[0]

    @property
    def name(self) -> str:
        return self.key.split("/", 1)[1]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def resolve(path: str | os.PathLike[str]) -> Path:
    """A checkpoint's directory from itself, or from the directory of all checkpoints (then what `latest` names).

    Raises FileNotFoundError.
    """
    path = Path(path)
    if (path / STATE).exists():
        return path
    step = latest_step(path)
    if step is None:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a directory with complete ones")
    return path / step_name(step)


def list_tensors(directory: str | os.PathLike[str]) -> list[TensorInfo]:
    """All stored tensors by key; reads no tensor data."""
    infos = []
    for key, stored in sorted(_metadata(Path(directory)).state_dict_metadata.items()):
        assert isinstance(stored, TensorStorageMetadata)
        infos.append(TensorInfo(key, tuple(stored.size), stored.properties.dtype, len(stored.chunks)))
    return infos


def verify(directory: str | os.PathLike[str]) -> list[str]:
    """Problems as sentences with path, expected and actual value; empty if all files are as they were written."""
    directory = Path(directory)
    try:
        files = read_manifest(directory)
    except ValueError as error:
        return [str(error)]
    return [problem for name, record in files.items() if (problem := problem_of(directory, name, record))]


def read_tensor(directory: str | os.PathLike[str], key: str) -> Tensor:
    """The whole logical tensor, on the CPU. Raises ValueError for an unknown key."""
    return read_tensors(directory, [key])[key]


def read_tensors(directory: str | os.PathLike[str], keys: Sequence[str]) -> dict[str, Tensor]:
    """Whole logical tensors by key; one pass over the files."""
    directory = Path(directory)
    metadata = _metadata(directory)
    if unknown := [key for key in keys if key not in metadata.state_dict_metadata]:
        known = sorted(metadata.state_dict_metadata)
        raise ValueError(f"{directory} has no tensor {', '.join(unknown[:5])}; it has {len(known)}, e.g. {known[:3]}")
    tensors, state = {}, {}
    for key in keys:
        stored = metadata.state_dict_metadata[key]
        assert isinstance(stored, TensorStorageMetadata)
        tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        kind, name = key.split("/", 1)
        shard = Shard(Rectangle.whole(name, tuple(stored.size)), {kind: tensors[key]})
        state[key] = StoredTensor(kind, tuple(stored.size), [shard])
    reader = FileSystemReader(directory)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    planner = ShardLoadPlanner(state, metadata)
    reader.read_data(planner.create_local_plan(), planner).wait()
    return tensors


def average(
    directories: Sequence[str | os.PathLike[str]],
    output_root: str | os.PathLike[str],
    *,
    kinds: Sequence[str] = ("master",),
    weights: Sequence[float] | None = None,
) -> Path:
    """The weighted mean (default: equal weights) of the same tensors of several checkpoints, summed in FP64.

    Written as a checkpoint under `output_root` with the last one's step and small state, plus "averaged_from".
    Raises ValueError if the checkpoints' names or shapes differ. Needs memory for one copy of `kinds`.
    """
    if not directories:
        raise ValueError("nothing to average: no checkpoints were given")
    paths = [Path(directory) for directory in directories]
    shares = list(weights) if weights is not None else [1.0] * len(paths)
    if len(shares) != len(paths) or sum(shares) <= 0:
        raise ValueError(f"{len(paths)} checkpoints need as many weights with a positive sum, got {shares}")
    first = _shapes(paths[-1], kinds)
    for path in paths:
        if different := sorted(first.items() ^ _shapes(path, kinds).items()):
            raise ValueError(f"{path} and {paths[-1]} differ in {len(different)} tensors, e.g. {different[:3]}")

    def mean(key: str) -> Tensor:
        total = sum(read_tensor(path, key).double() * share for path, share in zip(paths, shares, strict=True))
        assert isinstance(total, Tensor)
        return (total / sum(shares)).to(torch.float32)

    return _write(paths[-1], output_root, first, mean, {"averaged_from": [str(path) for path in paths]})


def extract(
    directory: str | os.PathLike[str], output_root: str | os.PathLike[str], *, kinds: Sequence[str] = ("master",)
) -> Path:
    """A checkpoint with only `kinds`, in one file. (Layouts need no conversion: any reads any.)"""
    path = Path(directory)
    return _write(path, output_root, _shapes(path, kinds), lambda key: read_tensor(path, key), {})


def _shapes(directory: Path, kinds: Sequence[str]) -> dict[str, tuple[int, ...]]:
    shapes = {info.key: info.shape for info in list_tensors(directory) if info.kind in kinds}
    if not shapes:
        raise ValueError(f"{directory} has no tensors of the kinds {list(kinds)}")
    return shapes


def _write(
    source: Path,
    output_root: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    extra: dict[str, Any],
) -> Path:
    state = read_state(source)
    destination = Path(output_root) / step_name(state["step"])
    if destination.exists():
        raise ValueError(f"{destination} exists already; choose another output directory")
    shards = []
    for key, shape in shapes.items():
        kind, name = key.split("/", 1)
        shards.append(Shard(Rectangle.whole(name, shape), {kind: read(key)}))
    config = CheckpointConfig(asynchronous=False, keep_last=EVERY_CHECKPOINT)
    store = CheckpointStore(output_root, Group.single("world"), config)
    meta = {**state["meta"], **extra}
    report = store.save(state["step"], shards, meta, tokens=state["tokens"], score=state["score"])
    if report.status is not SaveStatus.committed:
        raise OSError(f"the checkpoint under {output_root} was not written: {report.error}")
    return destination


def _metadata(directory: Path) -> Metadata:
    try:
        return FileSystemReader(directory).read_metadata()
    except Exception as error:  # whatever unpickling a damaged file raises
        raise ValueError(f"{directory / '.metadata'} cannot be read ({type(error).__name__}: {error})") from error
