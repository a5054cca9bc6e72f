"""RMSNorm on sequence-parallel rows, computed in FP32.

The weight is replicated over tensor-parallel ranks; each rank sees only its rows, so its gradient is partial and the
optimizer sums it over tp once per step (`Placement.tp_replicated`).

Not here: the kernels of Transformer Engine and Apex, and the choice between them (fused/norm.py).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.layers.fused.norm import NormImpl, fused_norm
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.parameter import constant_init, make_parameter, replicated_vector


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, statistics in FP32; `x.dtype` in and out.

    Raises ValueError with the remedy if the package of `impl` cannot be used.
    """

    def __init__(
        self, name: str, hidden: int, context: LayerContext, *, eps: float, impl: NormImpl = NormImpl.torch
    ) -> None:
        super().__init__()
        self.eps = eps
        placement = replicated_vector(f"{name}.weight", hidden)
        self.weight = make_parameter((hidden,), placement, constant_init(1.0), context.dtype, context.device)
        self._fused = fused_norm(impl, self.weight, eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"

    def forward(self, x_TD: Tensor) -> Tensor:
        if self._fused is not None:
            return self._fused(x_TD)
        return F.rms_norm(x_TD.float(), (x_TD.shape[-1],), self.weight.float(), self.eps).to(x_TD.dtype)
