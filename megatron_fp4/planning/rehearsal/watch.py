"""The one place that sees every operation of a rehearsed step, and hands it to whoever counts.

Operations between host tensors run as ever, with their values; those that touch the device run under FakeTensorMode,
which computes shapes and refuses to mix devices. In a backward pass an exception may end the process without a word
(torch 2.13, PrivateUse1: one that leaves a hook), so a refusal there is said at once, and ends it with a code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fp4.comm import row_exchange
from megatron_fp4.planning.rehearsal.copies import Copies
from megatron_fp4.planning.rehearsal.device import NAME, is_rehearsed
from megatron_fp4.planning.rehearsal.kernels import KernelCounts, tensors_of
from megatron_fp4.planning.rehearsal.live import LiveKinds
from megatron_fp4.planning.rehearsal.messages import Messages
from megatron_fp4.planning.rehearsal.origin import origin
from megatron_fp4.planning.stand_ins import cuda_kernels
from megatron_fp4.precision.backends.product import BY_DEVICE, multiply_on_cuda


class RehearsalRefused(RuntimeError):
    """An operation that a real device would refuse. The message names the file and line."""


class Watch(TorchDispatchMode):
    """What a step does. phase: where it is. on_backward_error: ends the process after a refusal in a backward pass."""

    def __init__(self, phase: Callable[[], str], on_backward_error: Callable[[str], NoReturn]) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.copies, self.live = Copies(self._fake), LiveKinds()
        self.kernels, self.messages = KernelCounts(), Messages(phase)
        self._phase, self._on_backward_error = phase, on_backward_error

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and to skip it torch would import torch._dynamo, which takes seconds."""
        return False

    def clear(self) -> None:
        """Forget what was counted; what is alive stays."""
        self.copies.clear()
        self.kernels.clear()
        self.messages.sequence.clear()
        self.live.begin()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around everything that is rehearsed."""
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # modes belong to one thread
            stack.enter_context(patch.object(FakeTensor, "tolist", lambda x: self.copies.listed(x)))
            stack.enter_context(patch.object(row_exchange, "read_counts", self.copies.read_evenly))
            stack.enter_context(patch.object(torch, "tensor", _with_device(torch.tensor, self.copies)))
            stack.enter_context(patch.object(torch.get_device_module(NAME), "synchronize", self.copies.waited))
            stack.enter_context(patch.dict(BY_DEVICE, {NAME: multiply_on_cuda}))
            stack.enter_context(cuda_kernels(on_gpu=True))
            stack.enter_context(self.kernels.with_compiled_stages(self._phase))
            stack.enter_context(self)
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "prim::device":
            return args[0].fake_device
        if name.startswith("c10d::"):
            self.messages.see(name.partition("::")[2], args)
        if name == "aten::empty" and kwargs.get("pin_memory"):
            return self.copies.pinned(args[0], kwargs)
        if not _touches_device(args, kwargs):
            return func(*args, **kwargs)
        result = self.copies.answer(name, args, kwargs)
        if result is NotImplemented:
            try:
                with self._fake:
                    result = func(*args, **kwargs)
            except Exception as error:
                self._refuse(name, error)
            if not name.startswith("c10d::"):
                self.kernels.see(func, self._phase())
        self.live.see((tensor for tensor in tensors_of(result) if is_rehearsed(tensor)), self._phase())
        return result

    def _refuse(self, name: str, error: Exception) -> NoReturn:
        if isinstance(error, RehearsalRefused):
            raise error
        reason = " ".join(str(error).split())
        sentence = f"{origin()}: {name.partition('::')[2]}: {reason[:300]}"
        if torch._C._current_autograd_node() is not None:
            self._on_backward_error(sentence)
        raise RehearsalRefused(sentence) from error


def _with_device(tensor: Callable[..., Tensor], copies: Copies) -> Callable[..., Tensor]:
    """`torch.tensor`, which copies values to the device without dispatching an operation."""

    def make(values: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        made_on_host = tensor(values, *args, **options)
        if device is None or torch.device(device).type != NAME:
            return made_on_host if device is None else made_on_host.to(device)
        return copies.made_from_values(made_on_host, torch.device(device))

    return make


def _touches_device(args: Any, kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == NAME:
        return True
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if is_rehearsed(value):
                return True
        elif isinstance(value, (list, tuple)) and any(is_rehearsed(x) for x in tensors_of(value)):
            return True
    return False
