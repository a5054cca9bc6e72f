"""One linear as numbers, for those who compare backends: what is multiplied, in which precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision.backends import OperandOrigin
from megatron_fp4.precision.spec import LinearPrecision

SCALES = {"x": 1.0, "w": 0.02, "dy": 1e-3}
"""Standard deviations as they are in training."""


@dataclass(frozen=True)
class LinearCase:
    """name: of the linear. shape: of the weight `[N, K]`. tokens: T, rows of x."""

    name: str
    shape: tuple[int, int]
    tokens: int
    precision: LinearPrecision

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """x `[T, K]`, w `[N, K]`, dy `[T, N]`."""
        N, K = self.shape
        return {"x": (self.tokens, K), "w": (N, K), "dy": (self.tokens, N)}

    def gaussian_tensors(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """x, w and dy, with the same values on every machine of a kind (a logarithm and a cosine have last bits)."""
        return {
            name: (normal(key_of("probe", name), *(torch.arange(s, device=device) for s in shape)) * SCALES[name]).to(
                dtype
            )
            for name, shape in self.shapes.items()
        }

    def origin(self, tensor: str, device: torch.device) -> OperandOrigin:
        """Where a tensor lies: whole, on one rank."""
        rows, cols = (torch.arange(size, device=device) for size in self.shapes[tensor])
        return OperandOrigin(self.name, tensor, rows, cols, Group.single(), seed=1, step=0)
