"""An accelerator that computes nothing: its tensors have shapes, types and a device, and no memory.

torch lets one device be written in Python (PrivateUse1). Its tensors are fake tensors, which find every operation
between a tensor of the device and one of the host, as a GPU would. It is the process's for good: torch takes one name.

Not here: what is seen of the operations (watch.py).
"""

from __future__ import annotations

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import backend_registration

NAME = "rehearsed"

_kernels = torch.library.Library("aten", "IMPL")
"""What CUDA has one kernel for; torch would compose it of several here, each with a result in memory."""


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.rehearsed`. Recomputation enters autocast; pipeline stages keep random state."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_autocast_enabled(self) -> bool:
        return False

    def set_autocast_enabled(self, enabled: bool) -> None:
        pass

    def get_autocast_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def set_autocast_dtype(self, dtype: torch.dtype) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        pass

    def set_device(self, device: object) -> None:
        pass

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        pass


@functools.cache
def rehearsal_device() -> torch.device:
    """The device, registered at the first call."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _kernels.impl("silu_backward", lambda grad, x: torch.empty_like(x), "PrivateUse1")
    return torch.device(NAME, 0)


def is_rehearsed(x: torch.Tensor) -> bool:
    """Whether a tensor lies on the device. `x.device` of a fake tensor would be dispatched as an operation."""
    return isinstance(x, FakeTensor) and x.fake_device.type == NAME
