"""Computing something a second time in the backward pass, instead of keeping what it saves for it.

With `recompute=selective` it is the part of a mixer between its two linears: attention core and activation are cheap to
compute and expensive to keep; the linears, with their quantization, are the opposite. With `full` it is a whole block.
Noise has an address, so no random state is kept. The linear behind an activation would keep its input, the activation's
result, as large as the argument that is kept for it: `recomputing` leaves the result out, so only one of them is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_recomputed(function: Callable[..., Tensor], *args: Any, when: bool) -> Tensor:
    """`function(*args)`. when: keep only the arguments, and compute the rest a second time in the backward pass."""
    if when and torch.is_grad_enabled():
        result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return result
    return function(*args)


@runtime_checkable
class HasCore(Protocol):
    """A mixer with a part between its linears that it may compute a second time."""

    recompute_core: bool


def recompute_cores(model: nn.Module) -> None:
    """Let every mixer of `model` that has a core compute it a second time."""
    for layer in model.modules():
        if isinstance(layer, HasCore):
            layer.recompute_core = True


@contextmanager
def recomputing(
    function: Callable[[Tensor], Tensor], argument: Tensor, result: Tensor, *, when: bool
) -> Iterator[None]:
    """Around what is computed from `result = function(argument)`, a cheap one: its backward pass makes `result` anew.

    What is saved of other tensors, or as a copy in another type, is kept as ever.
    """
    if not when or not torch.is_grad_enabled():
        yield
        return
    kept, place = argument.detach(), _place(result)

    def pack(tensor: Tensor) -> Tensor | None:
        return None if _place(tensor) == place else tensor

    def unpack(saved: Tensor | None) -> Tensor:
        if saved is not None:
            return saved
        with torch.no_grad():
            return function(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Where in which memory a tensor lies, on the meta device too, which has no addresses."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
