"""A checkpoint without a model, a job or torch.distributed: find it, list its tensors, verify it, read tensors whole.

A checkpoint is logical tensors, so one process can read any tensor whole whatever wrote it. Not here: making a
checkpoint of others (edit.py); a run's choice among its checkpoints (load.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.checkpoint.directory import STATE, check_step, load_order, read_state, step_name
from megatron_fp4.checkpoint.pieces.layout import dtype_of
from megatron_fp4.checkpoint.pieces.read import read_into
from megatron_fp4.checkpoint.pieces.stored import StoredPieces, read_pieces
from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.storage.durable import problem_of, read_manifest


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
    """A checkpoint's directory from itself, or from the directory of all checkpoints.

    Then it is what `latest` names, or the newest; whether it is complete is for its reader to see. Raises
    FileNotFoundError.
    """
    path = Path(path)
    if (path / STATE).exists():
        return path
    order = load_order(path)
    if not order:
        raise FileNotFoundError(f"{path} is neither a checkpoint nor a directory with some")
    return path / step_name(order[0])


def list_tensors(directory: str | os.PathLike[str]) -> list[TensorInfo]:
    """All stored tensors by key; reads no tensor data."""
    tensors = read_pieces(directory).tensors()
    return sorted((TensorInfo(key, shape, dtype_of(dtype), n) for key, shape, dtype, n in tensors), key=lambda i: i.key)


def verify(directory: str | os.PathLike[str]) -> list[str]:
    """Problems as sentences with path, expected and actual value; empty if all files are as they were written."""
    directory = Path(directory)
    try:
        manifest = read_manifest(directory)
        looks = (problem_of(directory, name, part, manifest.file_bytes(name)) for name, part in manifest.parts())
        if problems := list(dict.fromkeys(problem for problem in looks if problem)):
            return problems
        check_step(directory, manifest, read_state(directory))
        read_pieces(directory)
    except ValueError as error:
        return [str(error)]
    return []


def read_tensor(directory: str | os.PathLike[str], key: str, pieces: StoredPieces | None = None) -> Tensor:
    """The whole logical tensor, on the CPU. pieces: see `read_tensors`. Raises ValueError for an unknown key."""
    return read_tensors(directory, [key], pieces)[key]


def read_tensors(
    directory: str | os.PathLike[str], keys: Sequence[str], pieces: StoredPieces | None = None
) -> dict[str, Tensor]:
    """Whole logical tensors by key; one pass over the files.

    pieces: the checkpoint's, for whoever reads one tensor after the other; None: they are read here.
    """
    directory = Path(directory)
    pieces = pieces or read_pieces(directory)
    stored = {key: (shape, dtype) for key, shape, dtype, _ in pieces.tensors()}
    if unknown := [key for key in keys if key not in stored]:
        known = sorted(stored)
        raise ValueError(f"{directory} has no tensor {', '.join(unknown[:5])}; it has {len(known)}, e.g. {known[:3]}")
    tensors, shards = {}, []
    for key in keys:
        shape, dtype = stored[key]
        kind, name = key.split("/", 1)
        tensors[key] = torch.empty(shape, dtype=dtype_of(dtype))
        shards.append(Shard(Rectangle.whole(name, shape), {kind: tensors[key]}))
    read_into(shards, directory, pieces)
    return tensors
