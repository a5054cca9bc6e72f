"""What is read off the logits of the last stage, whose vocabulary is spread over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_gather_rows, all_reduce_max, even_counts
from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.embedding import vocab_range
from megatron_fp4.layers.loss import vocab_parallel_cross_entropy


def log_probabilities(logits_TV: Tensor, labels_T: Tensor, vocab_size: int, tp: Group) -> Tensor:
    """ln p(label) of each token, float32 `[T]`; 0 where the label is IGNORE. logits_TV: `[T, V/tp]`."""
    first, _ = vocab_range(vocab_size, tp)
    return -vocab_parallel_cross_entropy(logits_TV, labels_T, first=first, vocab_size=vocab_size, group=tp)


def likeliest(logits_TV: Tensor, vocab_size: int, tp: Group) -> Tensor:
    """The id with the largest logit, the first of equal ones, int64 `[T]`. logits_TV: `[T, V/tp]`."""
    first, _ = vocab_range(vocab_size, tp)
    z_TV = logits_TV.float()
    own_T = z_TV.amax(dim=-1)
    largest_T = all_reduce_max(own_T, tp)
    index_T = torch.where(own_T == largest_T, z_TV.argmax(dim=-1) + first, vocab_size)
    return -all_reduce_max(-index_T, tp)


def whole_rows(logits_BV: Tensor, vocab_size: int, tp: Group) -> Tensor:
    """Logits over the whole vocabulary, float32 `[B, V]`, from `[B, V/tp]`."""
    return all_gather_rows(logits_BV.float().T.contiguous(), tp, even_counts(vocab_size, tp.size)).T
