"""The AdamW update of FP32 shards, by torch's fused kernel, and the choice of who computes it.

One idea: an implementation is one function over update groups; state lives in the groups, not in the implementation, so
that a checkpoint does not depend on it. Apex and Transformer Engine have a file each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from megatron_fp4.optim.config import Impl, OptimConfig
from megatron_fp4.optim.groups import UpdateGroup


class AdamW(Protocol):
    """Updates masters and moments of the groups in place."""

    def update(self, lr: float, step: int) -> None:
        """step: number of this update, from 1 (bias correction)."""


class TorchAdamW:
    """`torch.optim.AdamW(fused=True)` without its state dictionary: bit for bit the same update."""

    def __init__(self, groups: Sequence[UpdateGroup], config: OptimConfig) -> None:
        self._groups, self._config = groups, config

    def update(self, lr: float, step: int) -> None:
        for group in self._groups:
            if not group.masters:
                continue
            count = torch.tensor(float(step), dtype=torch.float32, device=group.masters[0].device)
            torch._fused_adamw_(
                group.masters,
                group.grads,
                group.exp_avgs,
                group.exp_avg_sqs,
                [],
                [count] * len(group.masters),
                lr=lr,
                beta1=self._config.beta1,
                beta2=self._config.beta2,
                weight_decay=group.weight_decay,
                eps=self._config.eps,
                amsgrad=False,
                maximize=False,
            )


class AdapterAdamW:
    """A `FusedAdam` class of Apex or Transformer Engine over the groups' own tensors.

    Both keep `exp_avg` and `exp_avg_sq` per parameter and one step number per group; handing them ours before the first
    step leaves all state where the checkpoint finds it.
    """

    def __init__(self, fused_adam: Callable[..., Any], groups: Sequence[UpdateGroup], config: OptimConfig) -> None:
        self._groups = [group for group in groups if group.masters]  # a rank may own no rows
        self._optimizers = []
        for group in self._groups:
            optimizer = fused_adam(
                group.masters,
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=group.weight_decay,
                adam_w_mode=True,
            )
            for master, exp_avg, exp_avg_sq in zip(group.masters, group.exp_avgs, group.exp_avg_sqs, strict=True):
                optimizer.state[master] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            self._optimizers.append(optimizer)

    def update(self, lr: float, step: int) -> None:
        for group, optimizer in zip(self._groups, self._optimizers, strict=True):
            for master, grad in zip(group.masters, group.grads, strict=True):
                master.grad = grad
            optimizer.param_groups[0].update(lr=lr, step=step - 1)  # it counts up itself
            optimizer.step()


def choose_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> AdamW:
    """The implementation that `optim.impl` names. Raises ValueError with the remedy if it cannot be imported."""
    if config.impl is Impl.apex:
        from megatron_fp4.optim.adam_apex import make_apex_adamw

        return make_apex_adamw(groups, config)
    if config.impl is Impl.te:
        from megatron_fp4.optim.adam_te import make_transformer_engine_adamw

        return make_transformer_engine_adamw(groups, config)
    return TorchAdamW(groups, config)
