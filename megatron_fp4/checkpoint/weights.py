"""The weights of a checkpoint into the parameters of a model that has no optimizer.

Not here: which model, and what for (train/open.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fp4.checkpoint.load import CheckpointReader
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.comm.rect import Shard


@torch.no_grad()
def load_weights(
    model: nn.Module,
    reader: CheckpointReader,
    step: int | None = None,
    directory: Path | None = None,
    unread: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fill `model` from checkpoint `step` (None: the newest intact one), at any layout; returns its small state.

    directory: a checkpoint that lies elsewhere, instead. Masters are FP32 in the file and rounded to the parameters'
    dtype here, as in training. unread: beginnings of the names of tensors that the model need not have.
    """
    shards: list[Shard] = []
    targets: list[tuple[Tensor, Tensor]] = []
    for parameter in logical_parameters(model):
        for rows, where in parameter.placement.pieces():
            master = torch.empty(where.shape, dtype=torch.float32, device=parameter.device)
            shards.append(Shard(where, {"master": master}, writes=False))
            targets.append((parameter[rows], master))
    chosen = reader.verified(directory) if directory else reader.choose(step)
    if step is None and directory is None:
        chosen = reader.load_or_earlier(chosen, shards, unread)
    else:
        reader.load(chosen, shards, unread)
    for weights, master in targets:
        weights.copy_(master)
    return chosen.meta
