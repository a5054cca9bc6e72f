"""RMSNorm on sequence-parallel rows, computed in FP32.

The weight is replicated over tensor-parallel ranks; each rank sees only its rows, so its gradient is partial and the
optimizer sums it over tp once per step (`Placement.tp_replicated`). Transformer Engine's and Apex's kernels, one file
each, compute on this module's weight, so that a checkpoint does not depend on the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.parameter import constant_init, make_parameter, replicated_vector


class NormImpl(Enum):
    """Who computes RMSNorm; all three keep statistics in FP32."""

    torch = "torch"  # FP32 in and out of the kernel: keeps an FP32 copy of the input
    te = "te"  # transformer_engine.pytorch.RMSNorm: CUDA, BF16
    apex = "apex"  # apex.normalization.FusedRMSNorm: CUDA, BF16


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, statistics in FP32; `x.dtype` in and out.

    Raises ValueError with the remedy if the package of `impl` cannot be used.
    """

    def __init__(
        self, name: str, hidden: int, context: LayerContext, *, eps: float, impl: NormImpl = NormImpl.torch
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(
            (hidden,), replicated_vector(f"{name}.weight", hidden), constant_init(1.0), context.dtype, context.device
        )
        self._fused = fused_norm(impl, self.weight, eps)

    def forward(self, x_TD: Tensor) -> Tensor:
        if self._fused is not None:
            return self._fused(x_TD)
        return F.rms_norm(x_TD.float(), (x_TD.shape[-1],), self.weight.float(), self.eps).to(x_TD.dtype)


def fused_norm(impl: NormImpl, weight: nn.Parameter, eps: float) -> Callable[[Tensor], Tensor] | None:
    """The module that `impl` names, on `weight [D]`; None for torch's own function."""
    if impl is NormImpl.te:
        from megatron_fp4.layers.fused.norm_te import make_te_norm

        return make_te_norm(weight, eps)
    if impl is NormImpl.apex:
        from megatron_fp4.layers.fused.norm_apex import make_apex_norm

        return make_apex_norm(weight, eps)
    return None
