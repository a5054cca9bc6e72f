"""The short depthwise convolution of Mamba-2: causal, with bias and SiLU, in FP32.

With four taps it is four shifted multiply-adds, and written out they can stop at the beginning of a document, which a
convolution kernel cannot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x_BSW: Tensor, before_BJW: Tensor, weight: Tensor, bias: Tensor, documents_BI: Tensor | None = None
) -> Tensor:
    """`silu(conv(x))`, `[B, S, W]` in `x.dtype`: channel by channel, over the token and the J - 1 before it.

    before_BJW: the J - 1 tokens before the first (zeros at the start of a sequence). weight: `[W, J]`, the last column
    multiplies the token itself (as in torch's conv1d). documents_BI: int64 `[B, J-1+S]`, of the tokens before and of
    x; a tap that reaches into another document reads zero. None: one document.
    """
    work = torch.promote_types(x_BSW.dtype, torch.float32)
    S, J = x_BSW.shape[1], weight.shape[1]
    x_BIW, weight = torch.cat([before_BJW, x_BSW], dim=1).to(work), weight.to(work)
    total = x_BIW[:, J - 1 :] * weight[:, -1] + bias.to(work)
    for tap in range(J - 1):
        term = x_BIW[:, tap : tap + S] * weight[:, tap]
        if documents_BI is not None:
            elsewhere = documents_BI[:, tap : tap + S] != documents_BI[:, J - 1 :]
            term = term.masked_fill(elsewhere[..., None], 0.0)
        total = total + term
    return F.silu(total).to(x_BSW.dtype)
