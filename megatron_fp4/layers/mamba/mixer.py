"""The Mamba-2 mixer (arXiv 2405.21060), as the paper's hybrid models use it.

    z | x | B | C | dt = in_proj(u)         x | B | C = silu(causal_conv(x | B | C))
    y = SSD(x, softplus(dt + dt_bias), -exp(A_log), B, C) + D x
    out_proj(group_rms_norm(y * silu(z)))

Only the two projections are GEMMs with a precision; everything between them is in FP32 and belongs to one head or one
group, so tensor parallelism is a matter of holding fewer of them. The weights of the projections are never handed to a
fused kernel. A_log, dt_bias and D, three numbers a head, are FP32 parameters under any compute dtype: the decay of a
head is an exponential of two of them, and BF16 would move a step size by up to 1.6 %.

Letters as in ssd.py, on this rank: W = channels of x | B | C, I = H * P = channels of x.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.comm.rect import split_evenly
from megatron_fp4.layers.fused.pointwise import PointwiseImpl, pointwise_runner
from megatron_fp4.layers.layer_context import LayerContext, Tokens, widen
from megatron_fp4.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_fp4.layers.mamba.context_parallel import carry_states, in_pieces, previous_tokens
from megatron_fp4.layers.mamba.convolution import causal_conv
from megatron_fp4.layers.mamba.kernels import FusedMamba, MambaKernel
from megatron_fp4.layers.mamba.parameters import a_log_init, conv_parameter, dt_bias_init, vector_share
from megatron_fp4.layers.mamba.ssd import ScanMasks, document_starts, scan_masks, ssd_scan
from megatron_fp4.layers.parameter import constant_init
from megatron_fp4.layers.past import ScanState
from megatron_fp4.layers.recompute import run_recomputed


class MambaSizes(Protocol):
    """What the mixer reads of a model's configuration (models.config.ModelConfig)."""

    @property
    def hidden(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def mamba_num_heads(self) -> int: ...
    @property
    def mamba_head_dim(self) -> int: ...
    @property
    def mamba_num_groups(self) -> int: ...
    @property
    def mamba_state(self) -> int: ...
    @property
    def mamba_conv(self) -> int: ...
    @property
    def mamba_chunk(self) -> int: ...
    @property
    def pointwise_impl(self) -> PointwiseImpl: ...


class Mamba2(nn.Module):
    """x_TD `[T/tp, D]` -> `[T/tp, D]`.

    Heads and groups are sharded over tp, the sequence over cp. keep_documents_apart: state and convolution begin anew
    with every document. kernel: who computes convolution and scan. past: an attribute that may be set, to continue a
    text by torch on one context-parallel rank (layers/past.py). Raises ValueError if the groups do not divide by tp,
    or if the kernel cannot be used.
    """

    def __init__(
        self,
        name: str,
        config: MambaSizes,
        context: LayerContext,
        *,
        keep_documents_apart: bool,
        std: float,
        out_std: float,
        kernel: MambaKernel = MambaKernel.torch,
    ) -> None:
        super().__init__()
        inner = config.mamba_num_heads * config.mamba_head_dim
        states = config.mamba_num_groups * config.mamba_state
        conv_parts = {"x": inner, "B": states, "C": states}
        outputs = {"z": inner, **conv_parts, "dt": config.mamba_num_heads}
        self.past: ScanState | None = None
        self._context = context
        self._keep_documents_apart = keep_documents_apart
        self._chunk = config.mamba_chunk
        self._run = pointwise_runner(config.pointwise_impl, context)
        self._groups = split_evenly(config.mamba_num_groups, context.tp, what="model.mamba_num_groups")
        self._heads = split_evenly(config.mamba_num_heads, context.tp, what="model.mamba_num_heads")
        self._inner = inner // context.tp.size
        self._conv_rows = [size // context.tp.size for size in conv_parts.values()]
        self._fused = FusedMamba(context.device, context.cp.size) if kernel is MambaKernel.mamba_ssm else None
        self.in_proj = ColumnParallelLinear(f"{name}.in_proj", config.hidden, outputs, context, std=std)
        self.conv_weight = conv_parameter(name, "weight", conv_parts, config.mamba_conv, context)
        self.conv_bias = conv_parameter(name, "bias", conv_parts, config.mamba_conv, context)
        heads = config.mamba_num_heads
        self.A_log = vector_share(f"{name}.A_log", a_log_init, heads, context, torch.float32)
        self.dt_bias = vector_share(f"{name}.dt_bias", dt_bias_init, heads, context, torch.float32)
        self.D = vector_share(f"{name}.D", constant_init(1.0), heads, context, torch.float32)
        self.norm = GatedGroupRMSNorm(f"{name}.norm", inner, config.mamba_num_groups, context, eps=config.norm_eps)
        self.out_proj = RowParallelLinear(f"{name}.out_proj", inner, config.hidden, context, std=out_std)

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        projected_TW = widen(self.in_proj(x_TD, tokens))
        gated_TI = run_recomputed(self._core, projected_TW, tokens, when=True)
        return self.out_proj(gated_TI.to(x_TD.dtype), tokens)

    def _core(self, projected_TW: Tensor, tokens: Tokens) -> Tensor:
        """Everything between the projections, `[T, inner / tp]`.

        Always computed a second time in the backward pass, as attention kernels do: the decays between all pairs of
        tokens of a chunk alone would be `4 * H * Q` bytes a token.
        """
        B, S = tokens.positions.shape
        pieces = in_pieces(projected_TW.view(B, S, -1), self._context.cp)
        z_BSI, xBC_BSW, dt_BSH = pieces.split([self._inner, sum(self._conv_rows), self._heads], dim=-1)
        work = torch.promote_types(dt_BSH.dtype, torch.float32)
        dt_BSH = F.softplus(dt_BSH.to(work) + self.dt_bias.to(work))
        recur = self._recur if self._fused is None or self.past is not None else self._recur_fused
        x_BSHP, y_BSHP = recur(xBC_BSW, dt_BSH, -self.A_log.to(work).exp(), tokens)
        y_BSHP = y_BSHP + self.D.to(y_BSHP.dtype)[:, None] * x_BSHP
        return self.norm(y_BSHP.flatten(2), z_BSI).view(B * S, self._inner)

    def _recur(self, xBC_BSW: Tensor, dt_BSH: Tensor, A_H: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Convolution and recurrence by torch: x_BSHP after the convolution, and y_BSHP in FP32."""
        cp, reach = self._context.cp, self.conv_weight.shape[1] - 1
        past = self.past or ScanState()
        before_BJW = previous_tokens(xBC_BSW, reach, cp) if past.last_BJW is None else past.last_BJW
        if self.past is None:
            key = ("scan masks", self._keep_documents_apart, reach, self._chunk)
            documents_BI, masks = tokens.once(key, lambda: self._boundaries(tokens, past, self._chunk))
            chunk = self._chunk
        else:
            past.last_BJW = torch.cat([before_BJW, xBC_BSW[:, -reach:]], dim=1)[:, -reach:]
            chunk = min(self._chunk, xBC_BSW.shape[1])
            documents_BI, masks = self._boundaries(tokens, past, chunk)
        xBC_BSW = self._run(
            causal_conv,
            x_BSW=xBC_BSW,
            before_BJW=before_BJW,
            weight=self.conv_weight,
            bias=self.conv_bias,
            documents_BI=documents_BI,
        )
        x, B, C = self._heads_of(xBC_BSW)
        carry = functools.partial(carry_states, cp=cp) if cp.size > 1 else past.state_BHPN
        y, past.state_BHPN = ssd_scan(x, dt_BSH, A_H, B, C, chunk=chunk, masks=masks, initial=carry)
        return x, y

    def _recur_fused(self, xBC_BSW: Tensor, dt_BSH: Tensor, A_H: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """The same by the kernels of mamba-ssm."""
        assert self._fused is not None
        documents_BS = None
        if self._keep_documents_apart:
            documents_BS = tokens.once("documents of mamba-ssm", lambda: tokens.documents.int().contiguous())
        xBC_BSW = self._fused.conv(xBC_BSW, self.conv_weight, self.conv_bias, documents_BS)
        x, B, C = self._heads_of(xBC_BSW)
        return x, self._fused.scan(x, dt_BSH, A_H, B, C, chunk=self._chunk, documents_BS=documents_BS)

    def _boundaries(self, tokens: Tokens, past: ScanState, chunk: int) -> tuple[Tensor | None, ScanMasks]:
        """Documents of each piece and the tokens before it, `[B * pieces, reach + S / pieces]`; masks of the scan."""
        cp, reach = self._context.cp, self.conv_weight.shape[1] - 1
        if not self._keep_documents_apart:
            return None, scan_masks(None, chunk, tokens.documents.device)
        documents_BS = in_pieces(tokens.documents, cp)
        before_BJ = previous_tokens(documents_BS, reach, cp) if past.documents_BJ is None else past.documents_BJ
        starts_BS = document_starts(documents_BS, before_BJ[:, -1])
        documents_BI = torch.cat([before_BJ, documents_BS], dim=1)
        past.documents_BJ = documents_BI[:, -reach:]
        return documents_BI, scan_masks(starts_BS, chunk, documents_BS.device)

    def _heads_of(self, xBC_BSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_BSHP, B_BSGN and C_BSGN."""
        x, B, C = xBC_BSW.split(self._conv_rows, dim=-1)
        return (
            x.unflatten(-1, (self._heads, -1)),
            B.unflatten(-1, (self._groups, -1)),
            C.unflatten(-1, (self._groups, -1)),
        )


class GatedGroupRMSNorm(nn.Module):
    """`rms_norm(y * silu(z)) * weight` with the mean square over each group of channels; FP32 inside.

    y, z: `[..., inner / tp]`; result in `z.dtype`. Whole groups are on one rank, so the weight is sharded with them.
    """

    def __init__(self, name: str, inner: int, num_groups: int, context: LayerContext, *, eps: float) -> None:
        super().__init__()
        self._groups = num_groups // context.tp.size
        self._eps = eps
        self.weight = vector_share(f"{name}.weight", constant_init(1.0), inner, context, context.dtype)

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        gated = (y * F.silu(z.to(y.dtype))).unflatten(-1, (self._groups, -1))
        normed = F.rms_norm(gated, (gated.shape[-1],), eps=self._eps).flatten(-2)
        return (normed * self.weight.to(normed.dtype)).to(z.dtype)
