"""RMSNorm by `apex.normalization.FusedRMSNorm` (CUDA), on a weight that is ours."""

from __future__ import annotations

import importlib

from torch import nn


def make_apex_norm(weight: nn.Parameter, eps: float) -> nn.Module:
    """The module on `weight [D]`. Raises ValueError with the remedy if the package cannot be used."""
    try:
        norm: nn.Module = importlib.import_module("apex.normalization").FusedRMSNorm(weight.shape[0], eps=eps)
    except (ImportError, AttributeError, RuntimeError) as error:  # its constructor imports the compiled extension
        raise ValueError(
            f"model.norm_impl=apex: apex.normalization.FusedRMSNorm cannot be used here ({error}); build NVIDIA Apex"
            " with its CUDA extensions for this torch, use an NGC PyTorch image that has it, or set"
            " model.norm_impl=torch"
        ) from error
    norm.weight = weight  # for its own of the default type, on the CPU
    return norm
