"""Causal self-attention with grouped key-value heads, through torch's `scaled_dot_product_attention`.

Heads are sharded over tp (query and key-value heads alike), the sequence over cp (context_parallel.py). The
projections are ordinary linears with a precision of their own; the two batched products inside stay in the compute
dtype, as the paper keeps them (section 4.1).
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.comm.rect import split_evenly
from megatron_fp4.layers.context_parallel import causal_mask, context_parallel_attention
from megatron_fp4.layers.layer_context import LayerContext, Tokens, widen
from megatron_fp4.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_fp4.layers.past import KeyValues
from megatron_fp4.layers.qk_norm import QkNorm, make_qk_norm
from megatron_fp4.layers.recompute import run_recomputed
from megatron_fp4.layers.rope import RopeScalingConfig, apply_rope, rope_angles, rope_frequencies


class AttentionSizes(Protocol):
    """What an attention reads of a model's configuration (models.config.ModelConfig)."""

    @property
    def hidden(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def attention_head_dim(self) -> int: ...
    @property
    def rope_base(self) -> float: ...
    @property
    def rope_scaling(self) -> RopeScalingConfig: ...
    @property
    def rotary_dim(self) -> int: ...
    @property
    def qk_norm(self) -> QkNorm: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def sliding_window(self) -> int: ...


class Attention(nn.Module):
    """x_TD `[T/tp, D]` -> `[T/tp, D]`.

    keep_documents_apart: tokens attend only inside their document; otherwise the whole sample is causal. Attributes
    that may be set: recompute_core (recompute.py); past, to continue a text (past.py). Raises ValueError if a head
    count does not divide by tp.
    """

    def __init__(
        self,
        name: str,
        sizes: AttentionSizes,
        context: LayerContext,
        *,
        keep_documents_apart: bool,
        std: float,
        out_std: float,
    ) -> None:
        super().__init__()
        self.recompute_core = False
        self.past: KeyValues | None = None
        self._context = context
        self._head_dim = E = sizes.attention_head_dim
        self._heads = split_evenly(sizes.num_heads, context.tp, what="num_heads")
        self._kv_heads = split_evenly(sizes.num_kv_heads, context.tp, what="num_kv_heads")
        self._keep_documents_apart = keep_documents_apart
        self._window = sizes.sliding_window
        self._angle_factor = sizes.rope_scaling.angle_factor
        self._frequencies = None
        if sizes.rope_base:
            self._frequencies = rope_frequencies(sizes.rotary_dim, sizes.rope_base, sizes.rope_scaling, context.device)
        outputs = {"q": sizes.num_heads * E, "k": sizes.num_kv_heads * E, "v": sizes.num_kv_heads * E}
        bias = sizes.qkv_bias
        self.qkv = ColumnParallelLinear(f"{name}.qkv", sizes.hidden, outputs, context, std=std, bias=bias)
        kind, eps = sizes.qk_norm, sizes.norm_eps
        self.q_norm = make_qk_norm(kind, f"{name}.q_norm", sizes.num_heads, E, context, eps=eps)
        self.k_norm = make_qk_norm(kind, f"{name}.k_norm", sizes.num_kv_heads, E, context, eps=eps)
        self.out = RowParallelLinear(f"{name}.out", sizes.num_heads * E, sizes.hidden, context, std=out_std)

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        core_TN = run_recomputed(self._core, self.qkv(x_TD, tokens), tokens, when=self.recompute_core)
        return self.out(core_TN, tokens)

    def _core(self, qkv_TN: Tensor, tokens: Tokens) -> Tensor:
        """Everything between the projections, `[T, N / tp]`."""
        B, S = tokens.positions.shape
        E = self._head_dim
        sizes = [self._heads * E, self._kv_heads * E, self._kv_heads * E]
        q, k, v = (part.view(B, S, -1, E) for part in qkv_TN.split(sizes, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self._frequencies is not None:
            angles = rope_angles(tokens.positions, self._frequencies, self._angle_factor)
            q, k = apply_rope(q, angles), apply_rope(k, angles)
        return self._attend(widen(q), widen(k), widen(v), tokens).reshape(B * S, -1).to(qkv_TN.dtype)

    def _attend(self, q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, tokens: Tokens) -> Tensor:
        if self.past is not None:
            return self._continue(self.past, q_BSHE, k_BSGE, v_BSGE, tokens)
        documents = tokens.documents if self._keep_documents_apart else None
        if self._context.cp.size > 1:
            return context_parallel_attention(q_BSHE, k_BSGE, v_BSGE, documents, self._context.cp, self._window)
        S = q_BSHE.shape[1]
        if documents is None and not 0 < self._window < S:
            return attend(q_BSHE, k_BSGE, v_BSGE, None)
        mask = causal_mask(S, S, self._window, q_BSHE.device)
        if documents is not None:
            mask = document_mask(documents, documents) & mask
        return attend(q_BSHE, k_BSGE, v_BSGE, mask)

    def _continue(self, past: KeyValues, q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, tokens: Tokens) -> Tensor:
        """Attention of the next tokens to themselves and all before; inside a document, positions grow."""
        past.extend(k_BSGE, v_BSGE, tokens.positions, tokens.documents)
        assert past.k_BJGE is not None
        assert past.v_BJGE is not None
        assert past.places is not None
        positions_BJ, documents_BJ = past.places
        distance_BSJ = tokens.positions[:, :, None] - positions_BJ[:, None, :]
        mask = (distance_BSJ >= 0)[:, None]
        if self._window:
            mask = mask & (distance_BSJ < self._window)[:, None]
        if self._keep_documents_apart:
            mask = mask & document_mask(tokens.documents, documents_BJ)
        return attend(q_BSHE, past.k_BJGE, past.v_BJGE, mask)


def document_mask(documents_BS: Tensor, key_documents_BJ: Tensor) -> Tensor:
    """bool `[B, 1, S, J]`: query and key are tokens of one document."""
    return (documents_BS[:, :, None] == key_documents_BJ[:, None, :])[:, None]


def attend(q_BSHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; causal when `mask` is None, else the bool mask `[B, 1, S, J]` or `[S, J]` (True = attend)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BJGE, v_BJGE))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)
