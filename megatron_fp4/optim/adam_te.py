"""AdamW by `transformer_engine.pytorch.optimizers.FusedAdam` (CUDA): the only file here that imports that package."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from megatron_fp4.optim.adam import AdapterAdamW
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.groups import UpdateGroup


def make_transformer_engine_adamw(groups: Sequence[UpdateGroup], config: OptimConfig) -> AdapterAdamW:
    """Raises ValueError with the remedy if the package is missing or there is no CUDA device."""
    try:
        fused_adam = importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
        return AdapterAdamW(fused_adam, groups, config)
    except (ImportError, OSError, AttributeError, RuntimeError, AssertionError) as error:  # no library, no CUDA
        raise ValueError(
            f"optim.impl=te: transformer_engine.pytorch.optimizers.FusedAdam cannot be used here ({error}); install"
            " transformer-engine[pytorch] on a machine with a CUDA device, or set optim.impl=torch"
        ) from error
