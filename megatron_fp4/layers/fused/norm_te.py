"""RMSNorm by `transformer_engine.pytorch.RMSNorm` (CUDA), on a weight that is ours."""

from __future__ import annotations

import importlib

from torch import nn


def make_te_norm(weight: nn.Parameter, eps: float) -> nn.Module:
    """The module on `weight [D]`. Raises ValueError with the remedy if the package cannot be used."""
    try:
        rms_norm = importlib.import_module("transformer_engine.pytorch").RMSNorm
        norm: nn.Module = rms_norm(weight.shape[0], eps=eps, device="meta", dtype=weight.dtype)  # makes no weight
    except (ImportError, OSError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model.norm_impl=te: transformer_engine.pytorch.RMSNorm cannot be used here ({error}); install"
            " transformer-engine[pytorch] on a machine with a CUDA device, or set model.norm_impl=torch"
        ) from error
    norm.weight = weight  # its own was on the meta device
    return norm
