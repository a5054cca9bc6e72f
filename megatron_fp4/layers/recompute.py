"""Computing something a second time in the backward pass, instead of keeping what it saves for it.

With `recompute=selective` it is the part of a mixer between its two linears: attention core and activation are cheap to
compute and expensive to keep; the linears, with their quantization, are the opposite. With `full` it is a whole block.
Noise has an address, so no random state is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_recomputed(function: Callable[..., Tensor], *args: Any, when: bool) -> Tensor:
    """`function(*args)`. when: keep only the arguments, and compute the rest a second time in the backward pass."""
    if when and torch.is_grad_enabled():
        result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return result
    return function(*args)
