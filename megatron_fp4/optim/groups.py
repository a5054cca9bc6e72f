"""What an update works on: the flat FP32 tensors that this rank owns of each bucket.

AdamW keeps two moments of every element, Muon one. Beyond that parameters differ in the weight decay only, and the
placement says it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdamTensors:
    """Master weights, gradient and moments of the same elements; flat FP32 views of one length."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @staticmethod
    def start(parameters: Tensor, grads: Tensor) -> AdamTensors:
        """Before the first step. An FP32 tensor is shared: such parameters are their own masters."""
        master = parameters.float()
        return AdamTensors(master, grads.float(), torch.zeros_like(master), torch.zeros_like(master))

    def narrow(self, start: int, numel: int) -> AdamTensors:
        """Elements `[start, start + numel)`, as views."""
        tensors = (self.master, self.grad, self.exp_avg, self.exp_avg_sq)
        return AdamTensors(*(tensor[start : start + numel] for tensor in tensors))

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by kind."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


@dataclass(frozen=True, eq=False)
class MuonTensors:
    """Master weights, gradient and momentum of the same elements; flat FP32 views of one length."""

    master: Tensor
    grad: Tensor
    momentum: Tensor

    @staticmethod
    def start(parameters: Tensor, grads: Tensor) -> MuonTensors:
        """Before the first step. An FP32 tensor is shared: such parameters are their own masters."""
        master = parameters.float()
        return MuonTensors(master, grads.float(), torch.zeros_like(master))

    def narrow(self, start: int, numel: int) -> MuonTensors:
        """Elements `[start, start + numel)`, as views."""
        return MuonTensors(*(tensor[start : start + numel] for tensor in (self.master, self.grad, self.momentum)))

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by kind."""
        return {"master": self.master, "momentum": self.momentum}


@dataclass
class UpdateGroup:
    """What is updated with the same weight decay; empty on a rank that owns nothing of it."""

    weight_decay: float
    members: list[AdamTensors] = field(default_factory=list)
