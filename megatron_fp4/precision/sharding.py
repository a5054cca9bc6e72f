"""All that the GEMM function may know about the layout: who holds the other parts, and where the local part lies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.precision.backends.protocol import OperandOrigin


@dataclass(frozen=True, eq=False)
class Sharding:
    """How the tensors of one linear are spread over the ranks.

    name: logical name of the linear, "blocks.3.attention.qkv". x_group, w_group, dy_group: ranks that hold other parts
    of the logical x, w, dy (their amax is max-reduced there when amax_scope=tensor). n_index: int64 `[N]` global
    output-feature index of each local weight row. k_index: int64 `[K]` global input-feature index of each column.
    """

    name: str
    x_group: Group
    w_group: Group
    dy_group: Group
    n_index: Tensor
    k_index: Tensor

    def x(self, rows: Tensor, seed: int, step: int) -> OperandOrigin:
        """x `[T, K]`. rows: int64 `[T]` address of each token in the global batch."""
        return OperandOrigin(self.name, "x", rows, self.k_index, self.x_group, seed, step)

    def w(self, seed: int, step: int) -> OperandOrigin:
        """The weight `[N, K]`."""
        return OperandOrigin(self.name, "w", self.n_index, self.k_index, self.w_group, seed, step)

    def dy(self, rows: Tensor, seed: int, step: int) -> OperandOrigin:
        """dy `[T, N]`."""
        return OperandOrigin(self.name, "dy", rows, self.n_index, self.dy_group, seed, step)
