"""Weights of a checkpoint into a model without an optimizer: for evaluation, generation and export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fp4.checkpoint import CheckpointStore


@dataclass(frozen=True)
class _Weights:
    """A rectangle of which only the master weights are read."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensors: dict[str, Tensor]
    writes: bool = False


@torch.no_grad()
def load_weights(model: nn.Module, store: CheckpointStore, step: int | None = None) -> dict[str, Any]:
    """Fill `model` from checkpoint `step` (None: the newest intact one), at any layout; returns its small state.

    Masters are FP32 in the file and rounded to the parameters' dtype here, as in training.
    """
    shards: list[_Weights] = []
    targets: list[tuple[Tensor, Tensor]] = []
    for parameter in model.parameters():
        for segment in parameter.placement.segments:  # type: ignore[attr-defined, union-attr]
            rows = parameter[segment.start : segment.stop]
            master = torch.empty(rows.shape, dtype=torch.float32, device=parameter.device)
            shards.append(_Weights(segment.name, segment.global_shape, segment.global_offset, {"master": master}))
            targets.append((rows, master))
    meta = store.load(step, shards)
    for rows, master in targets:
        rows.copy_(master)
    return meta
