"""The optional CUDA kernels of `mamba-ssm` and `causal-conv1d`, for the two parts of Mamba-2 that are no GEMM.

Only the convolution and the scan are handed over. `mamba-ssm` also offers one kernel for the whole mixer; it would
multiply by the projection weights itself, in BF16, past the precision that is set on them, and is not used.
"""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


class MambaKernel(Enum):
    """Who computes convolution and scan."""

    torch = "torch"  # layers/mamba/ssd.py and layers/mamba/convolution.py: any device, context parallelism
    mamba_ssm = "mamba_ssm"  # the packages' Triton and CUDA kernels


class FusedMamba:
    """The two fused functions. Raises ValueError, with the remedy, where they cannot be used."""

    def __init__(self, device: torch.device, cp_size: int) -> None:
        advice = "; use the torch kernel (model.mamba_kernel=torch)"
        if cp_size > 1:
            raise ValueError(f"mamba_kernel = mamba_ssm does not pass states between cp = {cp_size} ranks{advice}")
        if device.type != "cuda":
            raise ValueError(f"mamba_kernel = mamba_ssm needs a CUDA device, this run is on {device.type}{advice}")
        try:
            self._conv: Any = import_module("causal_conv1d").causal_conv1d_fn
            self._scan: Any = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        except ImportError as error:
            raise ValueError(
                f"mamba_kernel = mamba_ssm, but {error.name} is not installed: pip install causal-conv1d mamba-ssm"
                f" --no-build-isolation{advice}"
            ) from error

    def conv(self, x_BSW: Tensor, weight: Tensor, bias: Tensor, documents_BS: Tensor | None) -> Tensor:
        """`silu(conv(x))`; see `causal_conv`. documents_BS: int32, contiguous."""
        out = self._conv(x_BSW.transpose(1, 2), weight, bias, seq_idx=documents_BS, activation="silu")
        return out.transpose(1, 2)

    def scan(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk: int, documents_BS: Tensor | None
    ) -> Tensor:
        """y_BSHP in FP32; see `ssd_scan`. documents_BS: int32, contiguous."""
        return self._scan(x, dt, A, B, C, chunk, seq_idx=documents_BS).float()
