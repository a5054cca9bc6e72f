"""Checkpoints made of others: the mean of several, or some kinds of tensors of one.

There is no conversion between layouts, because every layout reads every checkpoint. What remains of "convert" is
`extract`: some kinds of tensors (the masters for publishing) as a checkpoint of one file. A run begins from such a
checkpoint by `train.init_from`; it cannot go on from it, because the moments are missing.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.directory import read_state, step_name
from megatron_fp4.checkpoint.offline import list_tensors, read_tensor
from megatron_fp4.checkpoint.outcome import SaveFailed
from megatron_fp4.checkpoint.pieces.stored import read_pieces
from megatron_fp4.checkpoint.store import CheckpointStore
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.settings import MAX_SECONDS
from megatron_fp4.storage.local import check_room

EVERY_CHECKPOINT = 1 << 30
"""A `keep_last` that deletes nothing: what else is in the output directory stays."""


def average(
    directories: Sequence[str | os.PathLike[str]],
    output_root: str | os.PathLike[str],
    *,
    kinds: Sequence[str] = ("master",),
    weights: Sequence[float] | None = None,
) -> Path:
    """The weighted mean (default: equal weights) of the same tensors of several checkpoints, summed in FP64.

    Written as a checkpoint under `output_root` with the last one's step and small state, plus "averaged_from".
    Raises ValueError if the checkpoints' names or shapes differ. Needs memory for a few copies of one tensor.
    """
    if not directories:
        raise ValueError("nothing to average: no checkpoints were given")
    paths = [Path(directory) for directory in directories]
    shares = list(weights) if weights is not None else [1.0] * len(paths)
    if len(shares) != len(paths) or sum(shares) <= 0:
        raise ValueError(f"{len(paths)} checkpoints need as many weights with a positive sum, got {shares}")
    shapes = _shapes(paths[-1], kinds)
    for path in paths:
        if different := sorted(shapes.items() ^ _shapes(path, kinds).items()):
            raise ValueError(f"{path} and {paths[-1]} differ in {len(different)} tensors, e.g. {different[:3]}")

    pieces = [read_pieces(path) for path in paths]

    def mean(key: str) -> Tensor:
        parts = zip(paths, pieces, shares, strict=True)
        total = sum(read_tensor(path, key, stored).double() * share for path, stored, share in parts)
        assert isinstance(total, Tensor)
        return (total / sum(shares)).to(torch.float32)

    return _write(paths[-1], output_root, shapes, mean, {"averaged_from": [str(path) for path in paths]})


def minus_sqrt_weights(steps: Sequence[int]) -> list[float]:
    """Weights that make of checkpoints at a constant rate what a decay by 1 - sqrt(x) over their steps would have made.

    x is the part of the window, from the first checkpoint to the last. The update between two neighbours counts by the
    mean of the decay between them, so it is in the sum of the weights from there on (arXiv 2507.17634); the first
    checkpoint has what is missing to 1. Raises ValueError unless there are two steps or more, ascending.
    """
    if len(steps) < 2 or any(first >= second for first, second in itertools.pairwise(steps)):
        raise ValueError(f"weights minus_sqrt need two or more checkpoints of one run in ascending order, got {steps}")
    parts = [(step - steps[0]) / (steps[-1] - steps[0]) for step in steps]
    counted = [1.0 - 2 / 3 * (b**1.5 - a**1.5) / (b - a) for a, b in itertools.pairwise(parts)]
    return [first - second for first, second in itertools.pairwise([1.0, *counted, 0.0])]


def extract(
    directory: str | os.PathLike[str], output_root: str | os.PathLike[str], *, kinds: Sequence[str] = ("master",)
) -> Path:
    """A checkpoint with only `kinds`, in one file under `output_root`. Raises ValueError if it has none of them."""
    path = Path(directory)
    pieces = read_pieces(path)
    return _write(path, output_root, _shapes(path, kinds), lambda key: read_tensor(path, key, pieces), {})


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
    infos = {info.key: info.dtype for info in list_tensors(source)}
    tensors = {key: torch.empty(shape, dtype=infos[key], device="meta") for key, shape in shapes.items()}
    meta = {**state["meta"], **extra}
    return write_tensors(output_root, state["step"], tensors, read, meta, tokens=state["tokens"], score=state["score"])


@dataclass(frozen=True, eq=False, kw_only=True)
class _UnreadShard(Shard):
    """A shard whose tensors, on the meta device, say shapes and dtypes; values are read, by key, to be written."""

    values: Callable[[str], Tensor]

    def read(self, kind: str) -> Tensor:
        return self.values(f"{kind}/{self.name}").to(self.tensors[kind].dtype)


def check_destination(output_root: str | os.PathLike[str], step: int) -> Path:
    """The directory of a checkpoint to be written. Raises ValueError where it, or a file on its way, exists."""
    root, destination = Path(output_root), Path(output_root) / step_name(step)
    blocking = next((path for path in (root, *root.absolute().parents) if path.exists()), root)
    if not blocking.is_dir() or destination.exists():
        what = f"{destination} exists already" if destination.exists() else f"{blocking} is no directory"
        raise ValueError(f"{what}; choose another output directory")
    return destination


def write_tensors(
    output_root: str | os.PathLike[str],
    step: int,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    meta: Mapping[str, Any],
    *,
    tokens: int | None = None,
    score: float | None = None,
) -> Path:
    """A checkpoint of whole tensors under `output_root`, one in memory at a time; returns its directory.

    tensors: by key ("master/head.weight"), on the meta device. read: the values of one. Raises ValueError if the
    checkpoint exists, OSError if it cannot be written.
    """
    destination = check_destination(output_root, step)
    check_room(destination, sum(tensor.nbytes for tensor in tensors.values()))
    shards = []
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        where = Rectangle.whole(name, tuple(tensor.shape))
        shards.append(_UnreadShard(where=where, tensors={kind: tensor}, values=read))
    config = CheckpointConfig(
        asynchronous=False, keep_last=EVERY_CHECKPOINT, timeout_seconds=MAX_SECONDS, max_failures=1
    )
    store = CheckpointStore(output_root, Group.single("world"), config)
    try:
        store.save(step, shards, meta, tokens=tokens, score=score)
    except SaveFailed as error:
        raise OSError(f"the checkpoint under {output_root} was not written: {error.reason}") from None
    return destination
