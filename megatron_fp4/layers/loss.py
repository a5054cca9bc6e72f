"""Vocabulary-parallel cross-entropy.

One idea: the softmax needs two numbers from the other ranks per token, the largest logit and then (sum of exponentials,
logit of the label), so the logits themselves never travel. Exponentials are in FP32 whatever the logits are, their sum
in FP64, so that the number of shards does not show in it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_max, all_reduce_sum
from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.embedding import vocab_range

IGNORE = -100
"""Label of a position that is no target."""

CrossEntropy = Callable[[Tensor, Tensor], Tensor]
"""(logits_TV `[T, V_local]`, labels_T int64 `[T]` of global ids) -> loss of each token in nats, FP32 `[T]`."""


class LossImpl(Enum):
    """Who computes the cross-entropy of vocabulary-parallel logits."""

    torch = "torch"
    te = "te"  # transformer_engine.pytorch.cross_entropy: Triton kernels, CUDA, equal vocabulary parts


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
        top_T = all_reduce_max(z_TV.amax(dim=-1), group)
        z_TV = z_TV - top_T[:, None]
        counted_T = labels_T != IGNORE
        local_T = labels_T - first
        mine_T = counted_T & (local_T >= 0) & (local_T < z_TV.shape[-1])
        index_T = local_T.clamp(0, z_TV.shape[-1] - 1)
        picked_T = z_TV.gather(1, index_T[:, None])[:, 0].masked_fill(~mine_T, 0.0)
        total_T = z_TV.sum(-1, dtype=torch.float64) if smoothing else torch.zeros_like(picked_T).double()
        exp_TV = z_TV.exp_()
        parts = torch.stack([exp_TV.sum(-1, dtype=torch.float64), picked_T.double(), total_T])
        sums = all_reduce_sum(parts, group).float()
        loss_T = sums[0].log() - (1.0 - smoothing) * sums[1] - smoothing / vocab_size * sums[2]
        ctx.save_for_backward(exp_TV.div_(sums[0][:, None]), index_T, mine_T, counted_T)
        ctx.smoothing, ctx.vocab_size, ctx.dtype = smoothing, vocab_size, logits_TV.dtype
        return loss_T.masked_fill(~counted_T, 0.0)

    @staticmethod
    def backward(ctx: Any, g_T: Tensor) -> tuple[Tensor, None, None, None, None, None]:  # type: ignore[override]
        softmax_TV, index_T, mine_T, counted_T = ctx.saved_tensors
        dz_TV = softmax_TV - ctx.smoothing / ctx.vocab_size
        rows = torch.arange(dz_TV.shape[0], device=dz_TV.device)
        dz_TV[rows, index_T] -= (1.0 - ctx.smoothing) * mine_T.float()
        dz_TV *= (g_T * counted_T)[:, None]
        return dz_TV.to(ctx.dtype), None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, first: int, vocab_size: int, group: Group, smoothing: float = 0.0
) -> Tensor:
    """Loss of each token in nats, float32 `[T]`; 0 where the label is IGNORE.

    logits_TV: `[T, V_local]`, this rank's vocabulary rows `[first, first + V_local)`. labels_T: int64, global ids.
    """
    loss_T: Tensor = _VocabParallelCrossEntropy.apply(logits_TV, labels_T, first, vocab_size, smoothing, group)
    return loss_T


def choose_cross_entropy(impl: LossImpl, vocab_size: int, tp: Group, smoothing: float = 0.0) -> CrossEntropy:
    """The implementation that `model.loss_impl` names. Raises ValueError with the remedy if it cannot be used."""
    if impl is LossImpl.te:
        assert not smoothing, "refused by train.requirements"
        from megatron_fp4.layers.fused.loss import make_te_cross_entropy

        return make_te_cross_entropy(vocab_size, tp)
    first, _ = vocab_range(vocab_size, tp)

    def cross_entropy(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(
            logits_TV, labels_T, first=first, vocab_size=vocab_size, group=tp, smoothing=smoothing
        )

    return cross_entropy
