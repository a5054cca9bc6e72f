"""The largest attention logit of each head, by a second pass over q k^T.

Fused attention does not tell it (torch 2.13 returns a sum of exponentials at most), so the products are made once more,
some rows at a time, and nothing of them is kept: half of what attention itself computes, without the backward pass. The
logits are those that the softmax sees: scaled, rotated, and only where a query attends to the key.

Not here: the maximum over ranks (models/qk_clip.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.context_parallel import query_chunks

LOGITS = 2**24
"""Logits that are held at once, in FP32: 64 MiB."""


class LogitMaxima:
    """Largest logits since `forget`. values: FP32 `[heads]`, of this rank's query heads and tokens; -inf before any."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self.values = torch.full((heads,), -torch.inf, device=device)

    def forget(self) -> None:
        """Begin a step."""
        self.values.fill_(-torch.inf)

    @torch.no_grad()
    def observe(self, q_BSHE: Tensor, k_BJGE: Tensor, masks: Sequence[Tensor | None], cp: Group) -> None:
        """Look at a microbatch.

        k_BJGE: keys of the whole sequence, in its order. masks: what is added to the logits, see `attention_masks`.
        """
        if torch._C._current_graph_task_id() != -1:  # a backward pass computes the core once more: the same logits
            return
        for (rows, stop), mask in zip(query_chunks(q_BSHE.shape[1], cp), masks, strict=True):
            self._observe(q_BSHE[:, rows], k_BJGE[:, :stop], mask)

    def _observe(self, q_BSHE: Tensor, k_BJGE: Tensor, mask: Tensor | None) -> None:
        """Queries whose last one is at the last key. mask: None: causal."""
        B, S, H, E = q_BSHE.shape
        J, G = k_BJGE.shape[1:3]
        k_XEJ = k_BJGE.permute(0, 2, 3, 1).reshape(B * G, E, J)
        rows = max(1, LOGITS // (B * H * J))
        for first in range(0, S, rows):
            q_BsHE = q_BSHE[:, first : first + rows]
            s = q_BsHE.shape[1]
            keys = J - S + first + s  # those that one of these queries attends to
            q_XsE = q_BsHE.transpose(1, 2).reshape(B * G, H // G * s, E)
            logits = _product(q_XsE, k_XEJ[:, :, :keys]).view(B, H, s, keys)
            if mask is None:
                future = torch.ones(s, s, dtype=torch.bool, device=logits.device).triu_(1)
                logits[..., keys - s :].masked_fill_(future, -torch.inf)
            else:
                logits += mask[..., first : first + s, :keys]
            largest = logits.amax((0, 2, 3)) * E**-0.5
            torch.maximum(self.values, largest.to(torch.float32), out=self.values)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a [X, s, E] @ b [X, E, J]`, of BF16 in FP32."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
