"""AdamW by `apex.optimizers.FusedAdam` (CUDA): the only file that imports Apex."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from megatron_fp4.optim.adam import AdapterAdamW
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.groups import UpdateGroup


def make_apex_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> AdapterAdamW:
    """Raises ValueError with the remedy if Apex or its CUDA extension is missing."""
    try:
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
        return AdapterAdamW(fused_adam, groups, config)
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:  # TypeError: torch without CUDA types
        raise ValueError(
            f"optim.impl=apex: apex.optimizers.FusedAdam cannot be used here ({error}); build NVIDIA Apex with its CUDA"
            " extensions for this torch, use an NGC PyTorch image that has it, or set optim.impl=torch"
        ) from error
