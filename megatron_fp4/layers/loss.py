"""Vocabulary-parallel cross-entropy.

The softmax needs two messages from the other ranks, the largest logit of each token and then (sum of exponentials,
logit of the label), so the logits themselves never travel. Exponentials are in FP32 whatever the logits are, their sum
in FP64, so that the number of shards does not show in it.

Not here: Transformer Engine's kernels, and the choice between them (fused/loss.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_max, all_reduce_sum
from megatron_fp4.comm.mesh import Group

IGNORE = -100
"""Label of a position that is no target."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token loss over logits_TV `[T, V_local]`; this rank of the group holds vocabulary `[first, first + V_local)`.

    loss_t = log(sum_v exp(z_tv)) - (1 - s) * z_t,label - s / V * sum_v z_tv          (s = label smoothing)
    dz_tv  = g_t * (softmax(z_t)_v - (1 - s) * [v = label_t] - s / V)
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, first: int, vocab_size: int, smoothing: float, group: Group
    ) -> Tensor:
        z_TV = logits_TV.float()
        largest_T = all_reduce_max(z_TV.amax(dim=-1), group)
        z_TV = z_TV - largest_T[:, None]
        is_target_T = labels_T != IGNORE
        local_T = labels_T - first
        is_local_T = is_target_T & (local_T >= 0) & (local_T < z_TV.shape[-1])
        index_T = local_T.clamp(0, z_TV.shape[-1] - 1)
        label_logit_T = z_TV.gather(1, index_T[:, None])[:, 0].masked_fill(~is_local_T, 0.0)
        total_T = z_TV.sum(-1, dtype=torch.float64) if smoothing else torch.zeros_like(label_logit_T).double()
        exp_TV = z_TV.exp_()
        parts = torch.stack([exp_TV.sum(-1, dtype=torch.float64), label_logit_T.double(), total_T])
        sums = all_reduce_sum(parts, group).float()
        # a label that no rank has: without it, the loss of its token would be plausible, and its gradient too
        sums[0].masked_fill_(is_target_T & ((labels_T < 0) | (labels_T >= vocab_size)), float("nan"))
        loss_T = sums[0].log() - (1.0 - smoothing) * sums[1] - smoothing / vocab_size * sums[2]
        ctx.save_for_backward(exp_TV.div_(sums[0][:, None]), index_T, is_local_T, is_target_T)
        ctx.smoothing = smoothing
        ctx.vocab_size = vocab_size
        ctx.dtype = logits_TV.dtype
        return loss_T.masked_fill(~is_target_T, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (g_T,) = grads
        softmax_TV, index_T, is_local_T, is_target_T = ctx.saved_tensors
        dz_TV = softmax_TV - ctx.smoothing / ctx.vocab_size
        rows = torch.arange(dz_TV.shape[0], device=dz_TV.device)
        dz_TV[rows, index_T] -= (1.0 - ctx.smoothing) * is_local_T.float()
        dz_TV *= (g_T * is_target_T)[:, None]
        return dz_TV.to(ctx.dtype), None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, first: int, vocab_size: int, group: Group, smoothing: float = 0.0
) -> Tensor:
    """Loss of each token in nats, float32 `[T]`; 0 where the label is IGNORE, NaN where it is no id of the vocabulary.

    logits_TV: `[T, V_local]`, this rank's vocabulary rows `[first, first + V_local)`. labels_T: int64, global ids.
    """
    loss_T: Tensor = _VocabParallelCrossEntropy.apply(logits_TV, labels_T, first, vocab_size, smoothing, group)
    return loss_T
