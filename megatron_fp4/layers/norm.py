"""RMSNorm on sequence-parallel rows, computed in FP32.

The weight is replicated over tensor-parallel ranks; each rank sees only its rows, so its gradient is partial and the
optimizer sums it over tp once per step (`Placement.tp_replicated`).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.layers.parameter import constant_init, make_parameter, replicated_vector
from megatron_fp4.layers.wiring import Wiring


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dim, statistics in FP32; `x.dtype` in and out."""

    def __init__(self, name: str, hidden: int, wiring: Wiring, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = make_parameter(
            (hidden,), replicated_vector(f"{name}.weight", hidden), constant_init(1.0), wiring.dtype, wiring.device
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD.float(), (x_TD.shape[-1],), self.weight.float(), self.eps).to(x_TD.dtype)
