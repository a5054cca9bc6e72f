"""All that the GEMM function may know about the layout: who holds the other parts, and where the local part lies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.precision.backends.protocol import OperandOrigin
from megatron_fp4.precision.backends.randomness import expert_rows


@dataclass(frozen=True, eq=False)
class Sharding:
    """How the tensors of one linear are spread over the ranks.

    name: logical name of the linear, "blocks.3.attention.qkv". x_group, w_group, dy_group: ranks that hold other parts
    of the logical x, w, dy (their amax is max-reduced there when amax_scope=tensor). n_index: int64 `[N]` global
    output-feature index of each local weight row. k_index: int64 `[K]` global input-feature index of each column.
    expert: global number of the expert whose linear it is; its noise is drawn at addresses of its own. tokens: ranks
    that hold other tokens of the microbatch (their mean is taken over all of them); None: all are here.
    """

    name: str
    x_group: Group
    w_group: Group
    dy_group: Group
    n_index: Tensor
    k_index: Tensor
    expert: int | None = None
    tokens: Group | None = None

    def x(self, rows: Tensor, seed: int, step: int) -> OperandOrigin:
        """x `[T, K]`. rows: int64 `[T]` address of each token in the global batch."""
        return self._origin("x", rows, self.k_index, self.x_group, seed, step)

    def w(self, seed: int, step: int) -> OperandOrigin:
        """The weight `[N, K]`."""
        return self._origin("w", self.n_index, self.k_index, self.w_group, seed, step)

    def dy(self, rows: Tensor, seed: int, step: int) -> OperandOrigin:
        """dy `[T, N]`."""
        return self._origin("dy", rows, self.n_index, self.dy_group, seed, step)

    def _origin(self, operand: str, rows: Tensor, cols: Tensor, group: Group, seed: int, step: int) -> OperandOrigin:
        if self.expert is not None:
            rows = expert_rows(rows, self.expert)
        return OperandOrigin(self.name, operand, rows, cols, group, seed, step, self.expert, self.tokens)
