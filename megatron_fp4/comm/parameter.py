"""A parameter that knows where it lies in its logical tensors, and where its gradient is summed.

It is what the floors above hand to each other: a layer makes it with its placement, the optimizer gives it the place of
its gradient, the layer's backward adds to that place, the checkpoint reads what the rows are. It stands below all of
them, because they do not import each other. Not here: how it is made and filled (layers/parameter.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Placement, Rectangle

Initializer = Callable[[int, Rectangle, torch.device], Tensor]
"""(seed, rectangle of the logical tensor, device) -> its values, float32."""


class _LogicalParameterMeta(type(nn.Parameter)):  # type: ignore[misc]  # the stubs do not know its metaclass
    """torch makes no subclass of a fake tensor, but marks it as a parameter: then the attributes tell."""

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or isinstance(getattr(instance, "placement", None), Placement)


class LogicalParameter(nn.Parameter, metaclass=_LogicalParameterMeta):
    """This rank's part of one or more logical tensors.

    main_grad: the sum of its gradients, FP32, FP64 or BF16, of its shape; None until an optimizer has it. Who computes
    a gradient adds it there, calls `grad_ready` and leaves `.grad` alone; autograd's `.grad` is moved there by a hook.
    tied_group: the pipeline stages that hold a copy of it and whose gradients are added, if there are any.

    It stays what it is in modules, under `.data = view`, on the meta device and in copies; a copy belongs to no
    optimizer. Operations on it give plain tensors.
    """

    placement: Placement
    initializer: Initializer | None
    main_grad: Tensor | None
    grad_ready: Callable[[], None] | None
    tied_group: Group | None

    def __new__(cls, data: Tensor, placement: Placement, initializer: Initializer | None = None) -> LogicalParameter:
        """data: shared, not copied; its rows are what `placement` says."""
        parameter = super().__new__(cls, data.detach())
        parameter.placement = placement
        parameter.initializer = initializer
        parameter.main_grad = None
        parameter.grad_ready = None
        parameter.tied_group = None
        return parameter

    @staticmethod
    def whole(name: str, data: Tensor) -> LogicalParameter:
        """All of the logical tensor `name`, on this rank."""
        return LogicalParameter(data, Placement((Rectangle.whole(name, tuple(data.shape)),)))

    def __deepcopy__(self, memo: dict[int, Any]) -> LogicalParameter:
        if id(self) not in memo:
            copy = LogicalParameter(self.detach().clone(), self.placement, self.initializer)
            copy.tied_group = self.tied_group
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        copied: LogicalParameter = memo[id(self)]
        return copied

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return LogicalParameter, (self.detach(), self.placement)


def logical_parameters(module: nn.Module) -> Iterator[LogicalParameter]:
    """Every parameter of `module`. Raises TypeError for one that does not say where it lies."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, LogicalParameter):
            raise TypeError(f"parameter {name} is no LogicalParameter; make it with layers.parameter.make_parameter")
        yield parameter
