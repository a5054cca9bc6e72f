"""Which rows a full expert gives up.

In training an expert takes `capacity_factor` times its fair share of each segment, rounded up. A segment is a
microbatch of one data-parallel rank, or `segment_tokens` consecutive tokens; the ranks that hold parts of it tell each
other their choices, so that no layout changes which rows are dropped. A dropped row adds nothing, and the weights of
the token's other experts stay as they are (as in Megatron-LM). In evaluations nothing is dropped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_gather_rows
from megatron_fp4.layers.layer_context import LayerContext, Tokens, place_of
from megatron_fp4.layers.moe.config import Drop, MoeConfig


@torch.no_grad()
def rows_kept(
    experts_Tk: Tensor, weights_Tk: Tensor, tokens: Tokens, config: MoeConfig, context: LayerContext
) -> Tensor:
    """Which choices of this rank's rows are carried out, bool `[T, k]`. Collective over tp x cp."""
    k, T = config.top_k, len(experts_Tk)
    bits_Tk = weights_Tk.float().contiguous().view(torch.int32).long()  # weights are not negative: bits in their order
    packed = torch.cat([tokens.local_rows(context.tp)[:, None], experts_Tk, bits_Tk], dim=1)
    everyones = all_gather_rows(packed, context.tp_cp)
    address_N, experts_Nk = everyones[:, 0], everyones[:, 1 : k + 1]
    segment_N = place_of(address_N) // config.segment_tokens if config.segment_tokens else torch.zeros_like(address_N)
    queue_M = (segment_N[:, None] * config.num_experts + experts_Nk).flatten()
    order_M = address_N[:, None].expand_as(experts_Nk).flatten().argsort(stable=True)
    if config.drop is Drop.weight:
        order_M = order_M[everyones[:, k + 1 :].flatten()[order_M].argsort(descending=True, stable=True)]
    order_M = order_M[queue_M[order_M].argsort(stable=True)]
    sorted_M = queue_M[order_M]
    place_M = torch.arange(len(sorted_M), device=sorted_M.device) - torch.searchsorted(sorted_M, sorted_M)
    kept_M = torch.empty_like(place_M, dtype=torch.bool)
    kept_M[order_M] = place_M < capacity(config, config.segment_tokens or len(address_N))
    first = context.tp_cp.rank * T
    return kept_M.view(-1, k)[first : first + T]


def capacity(config: MoeConfig, num_tokens: int) -> int:
    """Rows that an expert takes of a segment of so many tokens."""
    return math.ceil(config.capacity_factor * config.top_k * num_tokens / config.num_experts)
