"""AdamW by the `FusedAdam` class of Apex or of Transformer Engine (CUDA): the only file here that imports either."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.groups import UpdateGroup


class FusedAdamW:
    """A `FusedAdam` class over the groups' own tensors.

    Both packages keep `exp_avg` and `exp_avg_sq` per parameter and one step number per group; handing them ours before
    the first step leaves all state where the checkpoint finds it.
    """

    def __init__(self, fused_adam: Callable[..., Any], groups: Sequence[UpdateGroup], config: OptimConfig) -> None:
        self._groups = [group for group in groups if group.members]
        self._optimizers = []
        for group in self._groups:
            optimizer = fused_adam(
                [member.master for member in group.members],
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                weight_decay=group.weight_decay,
                adam_w_mode=True,
            )
            for member in group.members:
                optimizer.state[member.master] = {"exp_avg": member.exp_avg, "exp_avg_sq": member.exp_avg_sq}
            self._optimizers.append(optimizer)

    def update(self, lr: float, step: int) -> None:
        for group, optimizer in zip(self._groups, self._optimizers, strict=True):
            for member in group.members:
                member.master.grad = member.grad
            optimizer.param_groups[0].update(lr=lr, step=step - 1)  # it counts up itself
            optimizer.step()


def apex_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> FusedAdamW:
    """AdamW by Apex's `FusedAdam`. Raises ValueError with the remedy if Apex or its CUDA extension is missing."""
    try:
        return FusedAdamW(importlib.import_module("apex.optimizers").FusedAdam, groups, config)
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:  # TypeError: torch without CUDA types
        raise ValueError(
            f"optim.impl=apex: apex.optimizers.FusedAdam cannot be used here ({error}); build NVIDIA Apex with its CUDA"
            " extensions for this torch, use an NGC PyTorch image that has it, or set optim.impl=torch"
        ) from error


def te_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> FusedAdamW:
    """AdamW by Transformer Engine. Raises ValueError with the remedy if the package or a CUDA device is missing."""
    try:
        module = importlib.import_module("transformer_engine.pytorch.optimizers")
        return FusedAdamW(module.FusedAdam, groups, config)
    except (ImportError, OSError, AttributeError, RuntimeError, AssertionError) as error:  # no library, no CUDA
        raise ValueError(
            f"optim.impl=te: transformer_engine.pytorch.optimizers.FusedAdam cannot be used here ({error}); install"
            " transformer-engine[pytorch] on a machine with a CUDA device, or set optim.impl=torch"
        ) from error
