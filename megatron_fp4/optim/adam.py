"""The AdamW update of FP32 shards, by torch's fused kernel, and the choice of who computes it.

An implementation is one function over update groups; state lives in the groups, not in the implementation, so that a
checkpoint does not depend on it. Not here: Apex's and Transformer Engine's kernels (fused_adam.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_fp4.optim.config import Impl, OptimConfig
from megatron_fp4.optim.fused_adam import apex_adamw, te_adamw
from megatron_fp4.optim.groups import UpdateGroup


class AdamW(Protocol):
    """Updates masters and moments of the groups in place."""

    def update(self, lr: float, step: int) -> None:
        """step: number of this update, from 1 (bias correction)."""


class TorchAdamW:
    """`torch.optim.AdamW(fused=True)` without its state dictionary: bit for bit the same update."""

    def __init__(self, groups: Sequence[UpdateGroup], config: OptimConfig) -> None:
        self._groups = [group for group in groups if group.members]
        self._config = config

    def update(self, lr: float, step: int) -> None:
        for group in self._groups:
            members = group.members
            count = torch.full((), float(step), dtype=torch.float32, device=members[0].master.device)  # no copy
            torch._fused_adamw_(
                [member.master for member in members],
                [member.grad for member in members],
                [member.exp_avg for member in members],
                [member.exp_avg_sq for member in members],
                [],
                [count] * len(members),
                lr=lr,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                weight_decay=group.weight_decay,
                eps=self._config.eps,
                amsgrad=False,
                maximize=False,
            )


def choose_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> AdamW:
    """The implementation that `optim.impl` names. Raises ValueError with the remedy if it cannot be imported."""
    if config.impl is Impl.apex:
        return apex_adamw(groups, config)
    if config.impl is Impl.te:
        return te_adamw(groups, config)
    return TorchAdamW(groups, config)
