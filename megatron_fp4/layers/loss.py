"""Vocabulary-parallel cross-entropy, and the divergence from a teacher's predictions.

The softmax needs two messages from the other ranks, the largest logit of each token and then (sum of exponentials,
logit of the label), so the logits themselves never travel. Exponentials are in FP32 whatever the logits are, their sum
in FP64, so that the number of shards does not show in it.

The logits are the largest tensor of a step, so of everything wider there is only a chunk of tokens at a time: the
logits are kept as they are, their exponentials are computed a second time for the gradient, and the gradient is written
over them. Whoever wants to read logits must do so before the backward pass.

Not here: Transformer Engine's kernels, and the choice between them (fused/loss.py).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_max, all_reduce_sum, even_counts
from megatron_fp4.comm.mesh import Group

IGNORE = -100
"""Label of a position that is no target."""
CHUNK = 2**24
"""Logits of which there are FP32 and FP64 copies at once."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Per-token loss over logits_TV `[T, V_local]`; this rank of the group holds vocabulary `[first, first + V_local)`.

    loss_t = log(sum_v exp(z_tv)) - (1 - s) * z_t,label - s / V * sum_v z_tv          (s = label smoothing)
    dz_tv  = g_t * (softmax(z_t)_v - (1 - s) * [v = label_t] - s / V)
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, first: int, vocab_size: int, smoothing: float, group: Group
    ) -> Tensor:
        largest_T = all_reduce_max(logits_TV.amax(dim=-1).float(), group)
        is_target_T, is_local_T, index_T = _placed(labels_T, first, logits_TV.shape[-1])
        parts = torch.zeros(3, logits_TV.shape[0], dtype=torch.float64, device=logits_TV.device)
        for rows in _chunks(logits_TV):
            z_TV = _below_largest(logits_TV[rows], largest_T[rows])
            parts[1, rows] = z_TV.gather(1, index_T[rows, None])[:, 0].masked_fill(~is_local_T[rows], 0.0)
            if smoothing:
                parts[2, rows] = z_TV.sum(-1, dtype=torch.float64)
            parts[0, rows] = z_TV.exp_().sum(-1, dtype=torch.float64)
        sums = all_reduce_sum(parts, group).float()
        # a label that no rank has: without it, the loss of its token would be plausible, and its gradient too
        sums[0].masked_fill_(is_target_T & ((labels_T < 0) | (labels_T >= vocab_size)), float("nan"))
        loss_T = sums[0].log() - (1.0 - smoothing) * sums[1] - smoothing / vocab_size * sums[2]
        ctx.save_for_backward(logits_TV, largest_T, sums[0].clone(), index_T, is_local_T, is_target_T)
        ctx.smoothing = smoothing
        ctx.vocab_size = vocab_size
        return loss_T.masked_fill(~is_target_T, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (g_T,) = grads
        logits_TV, largest_T, sum_T, index_T, is_local_T, is_target_T = ctx.saved_tensors
        z_TV = logits_TV.detach()  # its version counter is shared: autograd refuses whoever kept the logits too
        at_label_T = (1.0 - ctx.smoothing) * is_local_T.float()
        factor_T = g_T * is_target_T
        for rows in _chunks(logits_TV):
            dz_TV = _below_largest(z_TV[rows], largest_T[rows]).exp_().div_(sum_T[rows, None])
            if ctx.smoothing:
                dz_TV.sub_(ctx.smoothing / ctx.vocab_size)
            _subtract_at(dz_TV, index_T[rows], at_label_T[rows])
            z_TV[rows] = dz_TV.mul_(factor_T[rows, None])
        return z_TV, None, None, None, None, None


class Distilled(NamedTuple):
    """Losses of each token, FP32 `[T]`, 0 without a label: what is minimized, and its parts, without gradients."""

    minimized: Tensor
    cross_entropy: Tensor
    divergence: Tensor


class _VocabParallelDistillation(torch.autograd.Function):
    """Distance to a teacher's predictions, over z_TV and teacher_TV `[T, V_local]`, cut as in the cross-entropy above.

    loss_t = (1 - w) * CE_t + w * h^2 * KL_t             (w = weight, h = temperature)
    KL_t   = sum_v p_v (log p_v - log q_v)               with p = softmax(teacher_t / h), q = softmax(z_t / h)
    dz_tv  = g_t * ((1 - w) * (softmax(z_t)_v - [v = label_t]) + w * h * (q_v - p_v))
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        teacher_TV: Tensor,
        labels_T: Tensor,
        first: int,
        vocab_size: int,
        weight: float,
        temperature: float,
        group: Group,
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = [one.amax(dim=-1).float() for one in (logits_TV, teacher_TV)]
        largest = all_reduce_max(torch.stack(own), group)
        is_target_T, is_local_T, index_T = _placed(labels_T, first, logits_TV.shape[-1])
        parts = torch.zeros(5, logits_TV.shape[0], dtype=torch.float64, device=logits_TV.device)
        for rows in _chunks(logits_TV):
            z_TV = _below_largest(logits_TV[rows], largest[0, rows])
            parts[1, rows] = z_TV.gather(1, index_T[rows, None])[:, 0].masked_fill(~is_local_T[rows], 0.0)
            parts[0, rows] = z_TV.exp().sum(-1, dtype=torch.float64)
            z_TV.div_(temperature)
            a_TV = _below_largest(teacher_TV[rows], largest[1, rows]).div_(temperature)
            p_TV = a_TV.exp()
            parts[3, rows] = p_TV.sum(-1, dtype=torch.float64)
            parts[4, rows] = a_TV.sub_(z_TV).mul_(p_TV).sum(-1, dtype=torch.float64)
            parts[2, rows] = z_TV.exp_().sum(-1, dtype=torch.float64)
            del z_TV, a_TV, p_TV  # before those of the next rows
        of_z, at_label, of_q, of_p, gap = all_reduce_sum(parts, group)
        of_z.masked_fill_(is_target_T & ((labels_T < 0) | (labels_T >= vocab_size)), float("nan"))
        entropy_T = (of_z.log() - at_label).float().masked_fill(~is_target_T, 0.0)
        divergence_T = (gap / of_p - of_p.log() + of_q.log()).float().masked_fill(~is_target_T, 0.0)
        ctx.save_for_backward(
            logits_TV, teacher_TV, largest, torch.stack([of_z, of_q, of_p]).float(), index_T, is_local_T, is_target_T
        )
        ctx.weight, ctx.temperature = weight, temperature
        ctx.mark_non_differentiable(entropy_T, divergence_T)
        return (1.0 - weight) * entropy_T + weight * temperature**2 * divergence_T, entropy_T, divergence_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, teacher_TV, largest, sums, index_T, is_local_T, is_target_T = ctx.saved_tensors
        weight, temperature = ctx.weight, ctx.temperature
        z_TV = logits_TV.detach()
        at_label_T, factor_T = is_local_T.float(), grads[0] * is_target_T
        for rows in _chunks(logits_TV):
            p_TV = _below_largest(teacher_TV[rows], largest[1, rows]).div_(temperature).exp_()
            dz_TV = _below_largest(z_TV[rows], largest[0, rows]).div_(temperature).exp_().div_(sums[1, rows, None])
            dz_TV.sub_(p_TV.div_(sums[2, rows, None])).mul_(weight * temperature)
            del p_TV
            if weight < 1.0:
                of_labels_TV = _below_largest(z_TV[rows], largest[0, rows]).exp_().div_(sums[0, rows, None])
                _subtract_at(of_labels_TV, index_T[rows], at_label_T[rows])
                dz_TV.add_(of_labels_TV, alpha=1.0 - weight)
            z_TV[rows] = dz_TV.mul_(factor_T[rows, None])
        return z_TV, *[None] * 7


def _chunks(logits_TV: Tensor) -> list[slice]:
    """Tokens in parts of about `CHUNK` logits. Sixteen tokens at least: sums over one row are split between threads."""
    num_tokens, columns = logits_TV.shape
    counts = even_counts(num_tokens, -(-num_tokens // max(16, CHUNK // columns)))
    stops = itertools.accumulate(counts)
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def _placed(labels_T: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens `[T]` have a label, which a label in this rank's columns `[first, first + columns)`; its column."""
    is_target_T = labels_T != IGNORE
    local_T = labels_T - first
    return is_target_T, is_target_T & (local_T >= 0) & (local_T < columns), local_T.clamp(0, columns - 1)


def _subtract_at(z_TV: Tensor, index_T: Tensor, amounts_T: Tensor) -> None:
    """Take `amounts_T` off one column of each token, in place."""
    z_TV[torch.arange(len(z_TV), device=z_TV.device), index_T] -= amounts_T


def _below_largest(logits_TV: Tensor, largest_T: Tensor) -> Tensor:
    """How far each logit is below the largest of its token, FP32, a tensor of its own."""
    return logits_TV.to(torch.float32, copy=True).sub_(largest_T[:, None])


def vocab_parallel_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, *, first: int, vocab_size: int, group: Group, smoothing: float = 0.0
) -> Tensor:
    """Loss of each token in nats, float32 `[T]`; 0 where the label is IGNORE, NaN where it is no id of the vocabulary.

    logits_TV: `[T, V_local]`, this rank's vocabulary rows `[first, first + V_local)`; the backward pass overwrites them
    by their gradient. labels_T: int64, global ids.
    """
    loss_T: Tensor = _VocabParallelCrossEntropy.apply(logits_TV, labels_T, first, vocab_size, smoothing, group)
    return loss_T


def vocab_parallel_distillation(
    logits_TV: Tensor,
    teacher_TV: Tensor,
    labels_T: Tensor,
    *,
    first: int,
    vocab_size: int,
    weight: float,
    temperature: float,
    group: Group,
) -> Distilled:
    """How far logits are from those of a teacher, of the same shape, and from the labels: see the Function above.

    The rest as of `vocab_parallel_cross_entropy`. The teacher's logits are kept for the backward pass, and get no
    gradient.
    """
    return Distilled(
        *_VocabParallelDistillation.apply(
            logits_TV, teacher_TV, labels_T, first, vocab_size, weight, temperature, group
        )
    )
