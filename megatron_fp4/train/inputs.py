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
    """Tensors int64 `[num_micro * B, S / cp]` on the run's device. labels: IGNORE where a position is no target."""

    tokens: Tensor
    labels: Tensor
    address: Tensor
    positions: Tensor
    documents: Tensor

    def split(self, micro_batch: int) -> list[Inputs]:
        """Microbatches of `micro_batch` rows, views."""
        parts = [tensor.split(micro_batch) for tensor in self]
        return [Inputs(*group) for group in zip(*parts, strict=True)]


def make_inputs(batch: Batch, cp: Group, device: torch.device) -> Inputs:
    """This context-parallel rank's columns of a batch. The mask is by position: it becomes IGNORE labels here."""
    labels = batch.labels.masked_fill(~batch.loss_mask, IGNORE)
    columns = zigzag_index(batch.tokens.shape[1], cp)
    tensors = (batch.tokens, labels, batch.address, batch.positions, batch.documents)
    together = torch.stack([tensor[:, columns] for tensor in tensors])
    if device.type == "cuda":
        together = together.pin_memory()
    return Inputs(*together.to(device, non_blocking=True).unbind())
