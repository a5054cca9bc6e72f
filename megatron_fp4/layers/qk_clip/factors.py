"""What the rows of a fused q|k|v weight are multiplied with, so that no logit of the step would have been too large.

A logit is linear in its query and in its key, so a head whose largest logit S is above the threshold has it at the
threshold when queries are scaled by (threshold / S)^alpha and keys by (threshold / S)^(1 - alpha). Where several query
heads share a key head, S is the largest of the group and all of its heads are scaled alike: they have one key, and keep
their proportions. (Kimi K2, arXiv 2507.20534, section 2.1; for groups Megatron-core 0.16, SelfAttention.clip_qk.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HeadFactors(NamedTuple):
    """Factors in layers that are alike, FP32. queries: `[..., H]`. keys: `[..., G]`. clipped: bool `[..., H]`."""

    queries: Tensor
    keys: Tensor
    clipped: Tensor


def head_factors(maxima: Tensor, kv_heads: int, *, threshold: float, alpha: float) -> HeadFactors:
    """Factors of all heads. maxima: largest logits `[..., H]`, FP32; one that is not finite clips nothing.

    Powers are taken in FP64 and rounded: those of FP32 differ in their last bit with the place in a vector.
    """
    largest = maxima.double().unflatten(-1, (kv_heads, -1)).amax(-1)
    clips = (largest > threshold) & largest.isfinite()
    ratio = torch.where(clips, threshold / largest, 1.0)
    group = maxima.shape[-1] // kv_heads
    queries, clipped = (each.repeat_interleave(group, -1) for each in (ratio**alpha, clips))
    return HeadFactors(queries.float(), (ratio ** (1.0 - alpha)).float(), clipped)


def row_factors(queries: Tensor, keys: Tensor, head_dim: int) -> Tensor:
    """Factors of the rows of q|k|v, FP32 `[(H + 2 G) E]`. queries: `[H]`. keys: `[G]`."""
    return torch.cat([queries, keys, torch.ones_like(keys)]).repeat_interleave(head_dim)
