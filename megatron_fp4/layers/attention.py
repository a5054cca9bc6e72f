"""Causal self-attention with grouped key-value heads, through torch's `scaled_dot_product_attention`.

Heads are sharded over tp (query and key-value heads alike), the sequence over cp (context_parallel.py). The
projections are ordinary linears with a precision of their own; the two batched products inside stay in the compute
dtype, as the paper keeps them (section 4.1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.comm.rect import split_evenly
from megatron_fp4.layers.context_parallel import context_parallel_attention
from megatron_fp4.layers.layer_context import LayerContext, Tokens, widen
from megatron_fp4.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_fp4.layers.recompute import run_recomputed
from megatron_fp4.layers.rope import apply_rope, rope_angles


class Attention(nn.Module):
    """x_TD `[T/tp, D]` -> `[T/tp, D]`.

    rope_base: 0 for no position embedding (the hybrid models). keep_documents_apart: tokens attend only inside their
    document; otherwise the whole sample is causal. recompute_core: an attribute that may be set (recompute.py).
    Raises ValueError if a head count does not divide by tp.
    """

    def __init__(
        self,
        name: str,
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        context: LayerContext,
        *,
        rope_base: float,
        keep_documents_apart: bool,
        std: float,
        out_std: float,
    ) -> None:
        super().__init__()
        self.recompute_core = False
        self._context = context
        self._head_dim = head_dim
        self._heads = split_evenly(num_heads, context.tp, what="num_heads")
        self._kv_heads = split_evenly(num_kv_heads, context.tp, what="num_kv_heads")
        self._rope_base = rope_base
        self._keep_documents_apart = keep_documents_apart
        outputs = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        self.qkv = ColumnParallelLinear(f"{name}.qkv", hidden, outputs, context, std=std)
        self.out = RowParallelLinear(f"{name}.out", num_heads * head_dim, hidden, context, std=out_std)

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        core_TN = run_recomputed(self._core, self.qkv(x_TD, tokens), tokens, when=self.recompute_core)
        return self.out(core_TN, tokens)

    def _core(self, qkv_TN: Tensor, tokens: Tokens) -> Tensor:
        """Everything between the projections, `[T, N / tp]`."""
        B, S = tokens.positions.shape
        E = self._head_dim
        sizes = [self._heads * E, self._kv_heads * E, self._kv_heads * E]
        q, k, v = (part.view(B, S, -1, E) for part in qkv_TN.split(sizes, dim=-1))
        if self._rope_base:
            angles = rope_angles(tokens.positions, E, self._rope_base)
            q, k = apply_rope(q, angles), apply_rope(k, angles)
        return self._attend(widen(q), widen(k), widen(v), tokens).reshape(B * S, -1).to(qkv_TN.dtype)

    def _attend(self, q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, tokens: Tokens) -> Tensor:
        if self._context.cp.size > 1:
            documents = tokens.documents if self._keep_documents_apart else None
            return context_parallel_attention(q_BSHE, k_BSGE, v_BSGE, documents, self._context.cp)
        mask = document_mask(tokens.documents, tokens.documents) if self._keep_documents_apart else None
        if mask is not None:
            S = mask.shape[-1]
            mask = mask & torch.ones(S, S, dtype=torch.bool, device=mask.device).tril()
        return attend(q_BSHE, k_BSGE, v_BSGE, mask)


def document_mask(documents_BS: Tensor, key_documents_BJ: Tensor) -> Tensor:
    """bool `[B, 1, S, J]`: query and key are tokens of one document."""
    return (documents_BS[:, :, None] == key_documents_BJ[:, None, :])[:, None]


def attend(q_BSHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; causal when `mask` is None, else the bool mask `[B, 1, S, J]` (True = attend)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BJGE, v_BJGE))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)
