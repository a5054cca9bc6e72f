"""The AdamW update of FP32 shards, by torch's fused kernel, and the choice of who computes it.

An implementation is one function over update groups; state lives in the groups, not in the implementation, so that a
checkpoint does not depend on it. Not here: Apex's and Transformer Engine's kernels (fused_adam.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

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


class CautiousAdamW:
    """Weight decay only where the update has the sign of the weight, before another's update without weight decay.

    The update has the sign of the mean of the gradients, this one included; where that is 0, the weight decays.
    (Cautious Weight Decay, arXiv 2510.12402.)
    """

    def __init__(
        self,
        groups: Sequence[UpdateGroup],
        config: OptimConfig,
        make: Callable[[Sequence[UpdateGroup], OptimConfig], AdamW],
    ) -> None:
        self._groups = [group for group in groups if group.weight_decay]
        self._beta1 = config.beta1
        self._update = make([UpdateGroup(0.0, group.members) for group in groups], config)

    def update(self, lr: float, step: int) -> None:
        for group in self._groups:
            for member in group.members:
                direction = member.exp_avg.lerp(member.grad, 1 - self._beta1)
                decay_cautiously(member.master, direction, lr * group.weight_decay)
        self._update.update(lr, step)


def decay_cautiously(master: Tensor, direction: Tensor, decay: float) -> None:
    """Take the part `decay` from the weights whose sign is not the opposite of that of `direction`.

    direction: what an update then subtracts, of any scale.
    """
    opposite = master.sign().mul_(direction.sign()) < 0  # of signs, whose product does not underflow
    master.copy_(torch.where(opposite, master, master * (1 - decay)))


def torch_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> AdamW:
    """The update of torch, on any device."""
    return CautiousAdamW(groups, config, TorchAdamW) if config.cautious_decay else TorchAdamW(groups, config)


def choose_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> AdamW:
    """The implementation that `optim.impl` names. Raises ValueError with the remedy if it cannot be imported."""
    return CautiousAdamW(groups, config, _by_impl) if config.cautious_decay else _by_impl(groups, config)


def _by_impl(groups: Sequence[UpdateGroup], config: OptimConfig) -> AdamW:
    if config.impl is Impl.apex:
        return apex_adamw(groups, config)
    if config.impl is Impl.te:
        return te_adamw(groups, config)
    return TorchAdamW(groups, config)
