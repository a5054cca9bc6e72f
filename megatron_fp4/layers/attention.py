"""Causal self-attention with grouped key-value heads, through torch's `scaled_dot_product_attention`.

Heads are sharded over tp (query and key-value heads alike), the sequence over cp (context_parallel.py). The
projections are ordinary linears with a precision of their own; the two batched products inside stay in the compute
dtype, as the paper keeps them (section 4.1).

torch's attention makes numbers of a mask of booleans, `[S, S]` of them in the dtype of the queries, and keeps them for
the backward pass, in every layer anew. So masks are numbers from the beginning, made once a microbatch (`Tokens.once`):
`B * S^2` of them, which a plan counts. Where a mask would say no more than "causal" there is none.

Not here: varlen and flex attention, which need no mask; their sums are others than those of the kernels here.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import split_evenly
from megatron_fp4.layers.context_parallel import (
    context_parallel_attention,
    gather_sequence,
    in_sequence_order,
    query_chunks,
)
from megatron_fp4.layers.fused.pointwise import PointwiseImpl, pointwise_runner
from megatron_fp4.layers.layer_context import LayerContext, Tokens, widen
from megatron_fp4.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_fp4.layers.past import KeyValues
from megatron_fp4.layers.qk_clip.maxima import LogitMaxima
from megatron_fp4.layers.qk_norm import QkNorm, make_qk_norm
from megatron_fp4.layers.recompute import run_recomputed
from megatron_fp4.layers.rope import Rope, RopeScalingConfig, apply_rope


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
    @property
    def pointwise_impl(self) -> PointwiseImpl: ...


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
        self._maxima: LogitMaxima | None = None
        self._context = context
        self.head_dim = E = sizes.attention_head_dim
        self._heads = split_evenly(sizes.num_heads, context.tp, what="num_heads")
        self.kv_heads = split_evenly(sizes.num_kv_heads, context.tp, what="num_kv_heads")
        self._keep_documents_apart = keep_documents_apart
        self._window = sizes.sliding_window
        self._run = pointwise_runner(sizes.pointwise_impl, context)
        self._rope = Rope(sizes.rotary_dim, sizes.rope_base, sizes.rope_scaling) if sizes.rope_base else None
        outputs = {"q": sizes.num_heads * E, "k": sizes.num_kv_heads * E, "v": sizes.num_kv_heads * E}
        bias = sizes.qkv_bias
        self.qkv = ColumnParallelLinear(f"{name}.qkv", sizes.hidden, outputs, context, std=std, bias=bias)
        kind, eps = sizes.qk_norm, sizes.norm_eps
        self.q_norm = make_qk_norm(kind, f"{name}.q_norm", sizes.num_heads, E, context, eps=eps)
        self.k_norm = make_qk_norm(kind, f"{name}.k_norm", sizes.num_kv_heads, E, context, eps=eps)
        self.out = RowParallelLinear(f"{name}.out", sizes.num_heads * E, sizes.hidden, context, std=out_std)

    def watch_logits(self) -> LogitMaxima:
        """The largest logits of its heads in every forward pass from now on that has a backward pass."""
        self._maxima = LogitMaxima(self._heads, self._context.device)
        return self._maxima

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        core_TN = run_recomputed(self._core, self.qkv(x_TD, tokens), tokens, when=self.recompute_core)
        return self.out(core_TN, tokens)

    def _core(self, qkv_TN: Tensor, tokens: Tokens) -> Tensor:
        """Everything between the projections, `[T, N / tp]`."""
        B, S = tokens.positions.shape
        E = self.head_dim
        sizes = [self._heads * E, self.kv_heads * E, self.kv_heads * E]
        q, k, v = (part.view(B, S, -1, E) for part in qkv_TN.split(sizes, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self._rope is not None:
            cos, sin = tokens.once(self._rope, functools.partial(self._rope.angles, tokens.positions))
            q, k = (self._run(apply_rope, x_BSHE=part, cos=cos, sin=sin) for part in (q, k))
        return self._attend(widen(q), widen(k), widen(v), tokens).reshape(B * S, -1).to(qkv_TN.dtype)

    def _attend(self, q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, tokens: Tokens) -> Tensor:
        if self.past is not None:
            return self._continue(self.past, q_BSHE, k_BSGE, v_BSGE, tokens)
        cp, apart = self._context.cp, self._keep_documents_apart
        masks = attention_masks(tokens, cp, keep_documents_apart=apart, window=self._window, dtype=q_BSHE.dtype)
        if cp.size > 1:
            k_BSGE, v_BSGE = gather_sequence(k_BSGE, cp), gather_sequence(v_BSGE, cp)
        if self._maxima is not None and torch.is_grad_enabled():
            self._maxima.observe(q_BSHE, k_BSGE, masks, cp)
        if cp.size > 1:
            return context_parallel_attention(q_BSHE, k_BSGE, v_BSGE, masks, cp)
        return attend(q_BSHE, k_BSGE, v_BSGE, *masks)

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


def attend(q_BSHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; causal when `mask` is None.

    mask: `[B, 1, S, J]` or `[S, J]`, added to the scores (or bool: True = attend).
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHE, k_BJGE, v_BJGE))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out.transpose(1, 2)


def attention_masks(
    tokens: Tokens, cp: Group, *, keep_documents_apart: bool, window: int, dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """What is added to the scores of each chunk of this rank's queries, all of them without context parallelism.

    `[B, 1, rows, keys]`, or `[rows, keys]` without documents, 0 or -inf; None: causal. window: see `causal_mask`.
    """

    def make() -> tuple[Tensor | None, ...]:
        documents_BS = tokens.documents
        keys_BS = _whole_sequence(documents_BS, cp) if keep_documents_apart else None
        masks: list[Tensor | None] = []
        for rows, stop in query_chunks(documents_BS.shape[1], cp):
            if keys_BS is None and not 0 < window < stop:
                masks.append(None)
                continue
            allowed = causal_mask(rows.stop - rows.start, stop, window, documents_BS.device)
            if keys_BS is not None:
                allowed = document_mask(documents_BS[:, rows], keys_BS[:, :stop]).logical_and_(allowed)
            masks.append(torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf))
        return tuple(masks)

    return tokens.once(("attention masks", keep_documents_apart, window, dtype), make)


def _whole_sequence(documents_BS: Tensor, cp: Group) -> Tensor:
    """Document numbers of all context-parallel ranks in sequence order, `[B, cp * S]`."""
    if cp.size == 1:
        return documents_BS
    gathered = all_gather_rows(documents_BS.transpose(0, 1).contiguous(), cp)
    return in_sequence_order(gathered.view(cp.size, -1, gathered.shape[1]), cp).transpose(0, 1)


def document_mask(documents_BS: Tensor, key_documents_BJ: Tensor) -> Tensor:
    """bool `[B, 1, S, J]`: query and key are tokens of one document."""
    return (documents_BS[:, :, None] == key_documents_BJ[:, None, :])[:, None]


def causal_mask(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """bool `[rows, columns]`: which of `columns` keys the last `rows` tokens attend to.

    window: how many keys a token attends to at most, its own included; 0 = all before it.
    """
    causal = torch.ones(rows, columns, dtype=torch.bool, device=device).tril_(columns - rows)
    return causal.triu_(columns - rows - window + 1) if window else causal
