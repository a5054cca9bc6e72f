"""Stand-ins for the norm and loss of Transformer Engine and Apex: their signatures and habits, torch's arithmetic.

Signatures: TE's from its wheels (tests/precision/te/test_te_contract.py checks that the names are there), Apex's from
apex/normalization/fused_layer_norm.py of its repository.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class TeRMSNorm(nn.Module):
    """A weight on the meta device, or on the default CUDA device, made by the constructor; no FP32 copies."""

    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        sm_margin: int = 0,
    ) -> None:
        super().__init__()
        if device != "meta":
            raise RuntimeError("Found no NVIDIA driver on your system")
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.device == x.device, "the module would make a weight of its own (reset_parameters)"
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class ApexRMSNorm(nn.Module):
    """A weight on the CPU, in the default type."""

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape))

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.dtype == x.dtype, "the kernel takes input and weight of one type"
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)


class TeCrossEntropyFunction(torch.autograd.Function):
    """As in TE 2.10, and by position only: the gradient is written over the logits, the incoming gradient must be
    contiguous, and the first row of a rank is rank * (its own number of rows)."""

    @staticmethod
    def forward(
        ctx: Any,
        inp: Tensor,
        target: Tensor,
        label_smoothing: float = 0.0,
        reduce_loss: bool = False,
        dist_process_group: Any = None,
        ignore_idx: int = -100,
        is_cg_capturable: bool = False,
    ) -> Tensor:
        assert inp.dim() == 3, "logits are [B, S, V]"
        assert target.shape == inp.shape[:2]
        assert target.dtype == torch.int64
        assert not reduce_loss, "one loss per token is asked for"
        rank, parts = 0, [inp]
        if dist_process_group is not None:
            rank = dist.get_rank(dist_process_group)
            parts = [torch.empty_like(inp) for _ in range(dist.get_world_size(dist_process_group))]
            dist.all_gather(parts, inp.contiguous(), group=dist_process_group)
        whole = torch.cat(parts, -1).float().flatten(0, 1)
        labels = target.flatten()
        loss = F.cross_entropy(whole, labels, ignore_index=ignore_idx, reduction="none")
        gradient = whole.softmax(-1) - F.one_hot(labels.clamp(min=0), whole.shape[1])
        gradient[labels == ignore_idx] = 0.0
        rows = inp.shape[-1]
        inp.data.copy_(gradient[:, rank * rows : (rank + 1) * rows].view(inp.shape))
        ctx.save_for_backward(inp.detach())
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:  # type: ignore[override]
        assert grad_output.is_contiguous(), "2.10 reads beyond an expanded gradient"
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output[..., None], None, None, None, None, None, None


def parallel_cross_entropy(*arguments: Any) -> Tensor:
    loss: Tensor = TeCrossEntropyFunction.apply(*arguments)
    return loss


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages, with norm and loss only."""
    members = {
        "transformer_engine.pytorch": {"RMSNorm": TeRMSNorm},
        "transformer_engine.pytorch.cross_entropy": {"parallel_cross_entropy": parallel_cross_entropy},
        "apex.normalization": {"FusedRMSNorm": ApexRMSNorm},
    }
    for parent in ("transformer_engine", "apex"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    for name, contents in members.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
