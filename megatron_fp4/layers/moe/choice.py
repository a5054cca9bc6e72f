"""Which experts a token is sent to: the top k, ties broken by the expert's index, groups of experts first."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.layers.moe.config import MoeConfig

EPSILON = 1e-20
"""What keeps a sum of scores from being 0; as in Megatron-LM."""


def choose_experts(scores_TE: Tensor, bias_E: Tensor | None, config: MoeConfig) -> Tensor:
    """The experts of each token, int64 `[T, k]`, ascending. scores_TE: FP32; of equal ones the first is better."""
    ranked_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if config.num_groups > 1:
        ranked_TE = ranked_TE.masked_fill(~_in_best_groups(ranked_TE, config), -torch.inf)
    return best(ranked_TE, config.top_k).sort(dim=-1).values


def best(scores_TE: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest FP32 scores of each row, the best first; of equal ones the lower index."""
    bits = (scores_TE + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers in the order of the floating-point numbers
    place = torch.arange(scores_TE.shape[-1] - 1, -1, -1, device=scores_TE.device)
    return ((ordered << 32) + place).topk(count, dim=-1).indices


def _in_best_groups(ranked_TE: Tensor, config: MoeConfig) -> Tensor:
    """Which experts are in the groups whose two best scores have the largest sums (arXiv 2412.19437, 2.1.2)."""
    grouped_TGE = ranked_TE.unflatten(-1, (config.num_groups, -1))
    sums_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1).values.double().sum(-1).float()
    chosen_TG = torch.zeros_like(sums_TG, dtype=torch.bool).scatter_(-1, best(sums_TG, config.top_groups), True)
    return chosen_TG[..., None].expand_as(grouped_TGE).flatten(-2)


def weights_of(scores_TE: Tensor, experts_Tk: Tensor, config: MoeConfig) -> Tensor:
    """The weight of each chosen expert, `[T, k]` in the type of the scores."""
    weights_Tk = scores_TE.gather(-1, experts_Tk)
    if config.normalize:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdim=True) + EPSILON)
    return weights_Tk * config.scaling_factor


def counted(index: Tensor, size: int) -> Tensor:
    """How often each number below `size` is in `index` (int64, 1-D); FP64, in which sums over ranks are exact."""
    return torch.zeros(size, dtype=torch.float64, device=index.device).scatter_add_(
        0, index, torch.ones_like(index, dtype=torch.float64)
    )
