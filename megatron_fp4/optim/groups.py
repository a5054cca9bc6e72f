"""What an update works on: the flat FP32 tensors that this rank owns of each bucket.

AdamW keeps two moments of every element, Muon one. Beyond that parameters differ in the weight decay only, and the
placement says it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class UpdatedTensors:
    """Master weights and gradient of the same elements, and in subclasses moments; flat FP32 views of one length."""

    master: Tensor
    grad: Tensor

    @classmethod
    def start(cls, parameters: Tensor, grads: Tensor) -> Self:
        """Before the first step. An FP32 tensor is shared: such parameters are their own masters."""
        master = parameters.float()
        return cls(master, grads.float(), *(torch.zeros_like(master) for _ in cls.moments()))

    def narrow(self, start: int, numel: int) -> Self:
        """Elements `[start, start + numel)`, as views."""
        return type(self)(*(getattr(self, each.name)[start : start + numel] for each in fields(self)))

    @classmethod
    def moments(cls) -> list[str]:
        """The kinds that a subclass adds."""
        return [each.name for each in fields(cls)[2:]]

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by kind."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "grad"}


@dataclass(frozen=True, eq=False)
class AdamTensors(UpdatedTensors):
    """What AdamW updates, with its two moments."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True, eq=False)
class MuonTensors(UpdatedTensors):
    """What Muon updates, with its momentum."""

    momentum: Tensor


@dataclass
class UpdateGroup:
    """What is updated with the same weight decay; empty on a rank that owns nothing of it."""

    weight_decay: float
    members: list[AdamTensors] = field(default_factory=list)
