"""Computing the part of a mixer between its two linears a second time in the backward pass, instead of keeping it.

Attention core and activation are cheap to compute and expensive to keep; the linears, with their quantization, are the
opposite. So this part alone is recomputed (`recompute=selective`); it draws no random numbers.

Not here: recomputing whole blocks (`Decoder.forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_core(core: Callable[..., Tensor], *args: Any, recompute: bool) -> Tensor:
    """`core(*args)`. recompute: keep only the arguments, and compute the rest a second time in the backward pass."""
    if recompute and torch.is_grad_enabled():
        result: Tensor = checkpoint(core, *args, use_reentrant=False, preserve_rng_state=False)
        return result
    return core(*args)
