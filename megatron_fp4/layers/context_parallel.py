"""Attention over a sequence that is sharded over the context-parallel ranks.

The shards are zig-zag: the sequence is cut into 2 * cp chunks and rank r holds chunks r and 2 * cp - 1 - r, so that
under a causal mask every rank has the same work. Keys and values are gathered (each token's K and V are small next to
its activations with grouped heads) and put in sequence order; each of a rank's two query chunks then attends to the
prefix that ends with it. The softmax sees its keys in the same order as on one rank.

    cp = 2:   rank 0 holds chunks 0 3,   rank 1 holds chunks 1 2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fp4.comm.autograd import gather_rows
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


def gather_sequence(x_BSGE: Tensor, cp: Group) -> Tensor:
    """`[B, S, ...]` on each rank -> `[B, cp * S, ...]` in sequence order, with its gradient."""
    gathered = gather_rows(x_BSGE.transpose(0, 1).contiguous(), cp)
    return in_sequence_order(gathered.view(cp.size, -1, *gathered.shape[1:]), cp).transpose(0, 1)


def query_chunks(num_queries: int, cp: Group) -> list[tuple[slice, int]]:
    """This rank's queries in chunks that follow each other in the sequence, with the end of the keys before each."""
    if cp.size == 1:
        return [(slice(0, num_queries), num_queries)]
    chunk = num_queries // 2
    numbers = (cp.rank, 2 * cp.size - 1 - cp.rank)
    return [(slice(half * chunk, (half + 1) * chunk), (number + 1) * chunk) for half, number in enumerate(numbers)]


def context_parallel_attention(
    q_BSHE: Tensor, k_BJGE: Tensor, v_BJGE: Tensor, masks: Sequence[Tensor | None], cp: Group
) -> Tensor:
    """Attention of this rank's queries over the whole sequence, `[B, S, H, E]`.

    k_BJGE, v_BJGE: from `gather_sequence`. masks: see `attention_masks`.
    """
    outputs = []
    for (rows, stop), mask in zip(query_chunks(q_BSHE.shape[1], cp), masks, strict=True):
        q, k, v = (x.transpose(1, 2) for x in (q_BSHE[:, rows], k_BJGE[:, :stop], v_BJGE[:, :stop]))
        bias = _lower_right(rows.stop - rows.start, stop) if mask is None else mask
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _lower_right(rows: int, columns: int) -> Tensor:
    """torch's `causal_lower_right`, without what its constructor allocates and nothing reads: FP32 `[2, rows, columns]`
    (torch 2.13). It also cannot run while a `TorchDispatchMode` counts what a pass does."""
    from torch.nn.attention.bias import CausalBias, CausalVariant  # here: it imports torch._dynamo, which takes seconds

    bias = torch.empty(0).as_subclass(CausalBias)
    bias.variant = CausalVariant.LOWER_RIGHT
    bias.seq_len_q, bias.seq_len_kv = rows, columns
    return bias
