"""From a loader's batch to what the stages of a model are fed.

Everything per token is a `[rows, S]` tensor that is cut along its rows into microbatches, so a pipeline schedule and a
plain loop share it. Under context parallelism each rank keeps its zig-zag columns. They go to the device as one copy,
the only one of a step; on CUDA from pinned memory, so that the host does not wait for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.data.batch import Batch
from megatron_fp4.layers.context_parallel import zigzag_index
from megatron_fp4.layers.loss import IGNORE


class Inputs(NamedTuple):
    """Tensors int64 `[num_micro * B, S / cp]` on the run's device. labels: IGNORE where a position is no target.

    ahead: for multi-token prediction, int64 `[num_micro * B, S / cp, depth, 2]`: the token d positions ahead, and the
    label behind it.
    """

    tokens: Tensor
    labels: Tensor
    address: Tensor
    positions: Tensor
    documents: Tensor
    ahead: Tensor | None = None

    def split(self, micro_batch: int) -> list[Inputs]:
        """Microbatches of `micro_batch` rows, views."""
        parts = [tensor.split(micro_batch) for tensor in self if tensor is not None]
        return [Inputs(*group) for group in zip(*parts, strict=True)]


def look_ahead(batch: Batch, depth: int) -> Tensor | None:
    """Tokens and labels of each depth of multi-token prediction, as `Inputs.ahead` on the CPU; None at depth 0.

    At depth d a position has the token d positions later and is judged by that one's label. Beyond its sample or its
    document there is none: token 0 and the label IGNORE, as where that position is no target itself.
    """
    if not depth:
        return None
    B, S = batch.tokens.shape
    ahead = torch.zeros(B, S, depth, 2, dtype=torch.int64)
    ahead[..., 1] = IGNORE
    for d in range(1, min(depth, S - 1) + 1):
        same = batch.documents[:, d:] == batch.documents[:, :-d]
        ahead[:, :-d, d - 1, 0] = batch.tokens[:, d:].masked_fill(~same, 0)
        ahead[:, :-d, d - 1, 1] = batch.labels[:, d:].masked_fill(~(same & batch.loss_mask[:, d:]), IGNORE)
    return ahead


def count_targets(batch: Batch, ahead: Tensor | None) -> list[int]:
    """Target tokens of a batch, and of each depth of multi-token prediction."""
    of_depths = [] if ahead is None else (ahead[..., 1] != IGNORE).sum((0, 1)).tolist()
    return [int(batch.loss_mask.sum()), *of_depths]


def make_inputs(batch: Batch, cp: Group, device: torch.device, ahead: Tensor | None = None) -> Inputs:
    """This context-parallel rank's columns of a batch. The mask is by position: it becomes IGNORE labels here."""
    labels = batch.labels.masked_fill(~batch.loss_mask, IGNORE)
    columns = zigzag_index(batch.tokens.shape[1], cp)
    tensors = (batch.tokens, labels, batch.address, batch.positions, batch.documents)
    further = [] if ahead is None else ahead.flatten(2).unbind(2)
    together = torch.stack([tensor[:, columns] for tensor in (*tensors, *further)])
    if device.type == "cuda":
        together = together.pin_memory()
    together = together.to(device, non_blocking=True)
    inputs = Inputs(*together[: len(tensors)].unbind())
    if ahead is None:
        return inputs
    return inputs._replace(ahead=together[len(tensors) :].movedim(0, 2).unflatten(2, ahead.shape[2:]))
