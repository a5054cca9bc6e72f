"""Attention over a sequence that is sharded over the context-parallel ranks.

The shards are zig-zag: the sequence is cut into 2 * cp chunks and rank r holds chunks r and 2 * cp - 1 - r, so that
under a causal mask every rank has the same work. Keys and values are gathered (each token's K and V are small next to
its activations with grouped heads) and put in sequence order; each of a rank's two query chunks then attends to the
prefix that ends with it. The softmax sees its keys in the same order as on one rank.

    cp = 2:   rank 0 holds chunks 0 3,   rank 1 holds chunks 1 2
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.comm.autograd import gather_rows
from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.comm.mesh import Group


def zigzag_index(seq_length: int, cp: Group) -> Tensor:
    """Sequence positions that this rank holds, int64 `[seq_length / cp]`.

    Raises ValueError if the sequence does not cut into 2 * cp chunks.
    """
    if cp.size == 1:
        return torch.arange(seq_length)
    chunk, rest = divmod(seq_length, 2 * cp.size)
    if rest:
        raise ValueError(f"seq_length = {seq_length} is not divisible by 2 * cp = {2 * cp.size}")
    first, second = cp.rank * chunk, (2 * cp.size - 1 - cp.rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


def in_sequence_order(gathered: Tensor, cp: Group) -> Tensor:
    """`[cp, S, ...]` of zig-zag shards, rank after rank -> `[cp * S, ...]` in sequence order."""
    first, second = gathered.chunk(2, dim=1)
    return torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])


def _gather_sequence(x_BSGE: Tensor, cp: Group) -> Tensor:
    """`[B, S, ...]` on each rank -> `[B, cp * S, ...]` in sequence order, with its gradient."""
    gathered = gather_rows(x_BSGE.transpose(0, 1).contiguous(), cp)
    return in_sequence_order(gathered.view(cp.size, -1, *gathered.shape[1:]), cp).transpose(0, 1)


def context_parallel_attention(
    q_BSHE: Tensor, k_BSGE: Tensor, v_BSGE: Tensor, documents_BS: Tensor | None, cp: Group, window: int = 0
) -> Tensor:
    """Causal attention of this rank's queries over the whole sequence, `[B, S, H, E]`.

    documents_BS: document numbers of this rank's tokens to keep documents apart, or None. window: see `causal_mask`.
    """
    keys, values = _gather_sequence(k_BSGE, cp), _gather_sequence(v_BSGE, cp)
    documents = None
    if documents_BS is not None:
        gathered = all_gather_rows(documents_BS.transpose(0, 1).contiguous(), cp)
        documents = in_sequence_order(gathered.view(cp.size, -1, gathered.shape[1]), cp).transpose(0, 1)
    chunk = q_BSHE.shape[1] // 2
    outputs = []
    for half, chunk_number in enumerate((cp.rank, 2 * cp.size - 1 - cp.rank)):
        rows, stop = slice(half * chunk, (half + 1) * chunk), (chunk_number + 1) * chunk
        q, k, v = (x.transpose(1, 2) for x in (q_BSHE[:, rows], keys[:, :stop], values[:, :stop]))
        bias: Tensor = _lower_right(chunk, stop)
        if 0 < window < stop:
            bias = causal_mask(chunk, stop, window, q.device)
        if documents is not None and documents_BS is not None:
            same = documents_BS[:, rows, None] == documents[:, None, :stop]
            bias = (same & causal_mask(chunk, stop, window, q.device))[:, None]
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def causal_mask(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """bool `[rows, columns]`: which of `columns` keys the last `rows` tokens attend to.

    window: how many keys a token attends to at most, its own included; 0 = all before it.
    """
    causal = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
    return causal.triu(columns - rows - window + 1) if window else causal


def _lower_right(rows: int, columns: int) -> Tensor:
    """torch's `causal_lower_right`, without what its constructor allocates and nothing reads: FP32 `[2, rows, columns]`
    (torch 2.13). It also cannot run while a `TorchDispatchMode` counts what a pass does."""
    from torch.nn.attention.bias import CausalBias, CausalVariant  # here: it imports torch._dynamo, which takes seconds

    bias = torch.empty(0).as_subclass(CausalBias)
    bias.variant = CausalVariant.LOWER_RIGHT
    bias.seq_len_q, bias.seq_len_kv = rows, columns
    return bias
