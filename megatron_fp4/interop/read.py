"""Weights of another library as a checkpoint of ours: weights only, for `train.init_from`, `export` and `average`.

A run can also begin from the folder itself; importing checks and converts once what many runs begin from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.checkpoint.edit import write_tensors
from megatron_fp4.comm.rect import Rectangle
from megatron_fp4.models.foreign.source import ForeignSource, provenance
from megatron_fp4.settings import to_json_values
from megatron_fp4.storage.durable import hash_of

MASTER = "master"


@dataclass(frozen=True)
class Imported:
    """A checkpoint made of a folder. model: the settings that a run on it needs. source: what it was made of."""

    directory: Path
    model: Mapping[str, Any]
    source: ForeignSource


def import_weights(weights: ForeignSource, to: Path) -> Imported:
    """Write the weights as checkpoint 0 under `to`, FP32, one tensor in memory at a time.

    Raises ValueError for values that are no weights, OSError.
    """
    weights.check_tied()
    tensors = {f"{MASTER}/{name}": torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}

    def read(key: str) -> torch.Tensor:
        name = key.split("/", 1)[1]
        return weights.read(Rectangle.whole(name, weights.shapes[name]))

    model = to_json_values(weights.config)
    meta = {
        "config": {"model": model, "data": {"seq_length": weights.max_length}},
        "init_from": provenance(weights, {path.name: hash_of(path) for path in weights.files()}),
    }
    return Imported(write_tensors(to, 0, tensors, read, meta), model, weights)
