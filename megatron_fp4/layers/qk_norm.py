"""RMSNorm of queries and keys, between their projection and the rotation: of each head, or over all heads at once.

Under tensor parallelism a rank has some of the heads. One weight for every head is replicated, and its gradient, which
is of those heads only, summed over tp like that of every norm; a weight over all heads is sharded like the heads, and
what is summed, forward and backward, is the squares of a token.

Not here: the kernels of Transformer Engine and Apex, which `model.norm_impl` chooses for the other norms only.
"""

from __future__ import annotations

from enum import Enum

from torch import Tensor, nn

from megatron_fp4.comm.autograd import copy_to_group, reduce_from_group
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.norm import RMSNorm
from megatron_fp4.layers.parameter import constant_init, make_parameter, sharded_vector


class QkNorm(Enum):
    """Whether queries and keys are normalized before they are rotated."""

    none = "none"
    head = "head"  # each head, one weight of head_dim for all of them (Qwen 3)
    full = "full"  # all heads of a token at once, a weight as wide as they are together (OLMo 2)


class NormAcrossHeads(nn.Module):
    """RMSNorm over all heads of a token, of which this rank has some: x_BSHE `[B, S, H/tp, E]` in and out.

    The sum of squares, and in FP32 compute everything, is wider than the input: see `widen`.
    """

    def __init__(self, name: str, num_heads: int, head_dim: int, context: LayerContext, *, eps: float) -> None:
        super().__init__()
        self._tp = context.tp
        self._width = num_heads * head_dim
        self._eps = eps
        local = self._width // context.tp.size
        placement = sharded_vector(
            f"{name}.weight", self._width, context.tp.rank * local, (context.tp.rank + 1) * local
        )
        self.weight = make_parameter((local,), placement, constant_init(1.0), context.dtype, context.device)

    def forward(self, x_BSHE: Tensor) -> Tensor:
        x = x_BSHE.flatten(2)
        wide = x.double() if x.element_size() == 4 else x.float()
        squares = wide.square().sum(-1, keepdim=True)
        mean = copy_to_group(reduce_from_group(squares, self._tp), self._tp) / self._width
        normed = wide * (mean + self._eps).rsqrt() * self.weight.to(wide.dtype)
        return normed.to(x.dtype).view_as(x_BSHE)


def make_qk_norm(
    kind: QkNorm, name: str, num_heads: int, head_dim: int, context: LayerContext, *, eps: float
) -> nn.Module | None:
    """The norm of `num_heads` query or key heads, of which `context.tp` has its share; None for none."""
    if kind is QkNorm.none:
        return None
    if kind is QkNorm.full:
        return NormAcrossHeads(name, num_heads, head_dim, context, eps=eps)
    return RMSNorm(name, head_dim, context, eps=eps)
