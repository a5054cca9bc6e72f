"""RMSNorm by the kernels of Transformer Engine or Apex (CUDA, BF16), on a weight that is ours.

Each package's module is made as small as it allows and then given our parameter, so that names, initial values and
checkpoints do not depend on the choice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from enum import Enum

from torch import Tensor, nn


class NormImpl(Enum):
    """Who computes RMSNorm; all three keep statistics in FP32."""

    torch = "torch"  # FP32 in and out of the kernel: keeps an FP32 copy of the input
    te = "te"  # transformer_engine.pytorch.RMSNorm: CUDA, BF16
    apex = "apex"  # apex.normalization.FusedRMSNorm: CUDA, BF16


def fused_norm(impl: NormImpl, weight: nn.Parameter, eps: float) -> Callable[[Tensor], Tensor] | None:
    """The module that `impl` names, on `weight [D]`; None for torch's own function.

    Raises ValueError with the remedy if the package cannot be used.
    """
    if impl is NormImpl.torch:
        return None
    norm = _te_norm(weight, eps) if impl is NormImpl.te else _apex_norm(weight, eps)
    norm.weight = weight
    return norm


def _te_norm(weight: nn.Parameter, eps: float) -> nn.Module:
    try:
        rms_norm = importlib.import_module("transformer_engine.pytorch").RMSNorm
        norm: nn.Module = rms_norm(weight.shape[0], eps=eps, device="meta", dtype=weight.dtype)  # makes no weight
    except (ImportError, OSError, AttributeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model.norm_impl=te: transformer_engine.pytorch.RMSNorm cannot be used here ({error}); install"
            " transformer-engine[pytorch] on a machine with a CUDA device, or set model.norm_impl=torch"
        ) from error
    return norm


def _apex_norm(weight: nn.Parameter, eps: float) -> nn.Module:
    """Made with a weight of its own, of the default type, on the CPU."""
    try:
        norm: nn.Module = importlib.import_module("apex.normalization").FusedRMSNorm(weight.shape[0], eps=eps)
    except (ImportError, AttributeError, RuntimeError) as error:  # its constructor imports the compiled extension
        raise ValueError(
            f"model.norm_impl=apex: apex.normalization.FusedRMSNorm cannot be used here ({error}); build NVIDIA Apex"
            " with its CUDA extensions for this torch, use an NGC PyTorch image that has it, or set"
            " model.norm_impl=torch"
        ) from error
    return norm
