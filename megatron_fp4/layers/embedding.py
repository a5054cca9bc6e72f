"""Vocabulary-parallel token embedding and head.

Rows of their tables are spread over tp as evenly as possible, the first ranks taking the remainder, so a vocabulary
needs no padding rows: nothing has to be masked from the softmax or dropped on export.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.comm.autograd import scatter_sum_rows
from megatron_fp4.comm.collectives import even_counts
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.linear import ColumnParallelLinear, ParallelLinear, column_sharding
from megatron_fp4.layers.parameter import make_parameter, normal_init


def vocab_range(vocab_size: int, tp: Group) -> tuple[int, int]:
    """Vocabulary rows `[first, stop)` of this tensor-parallel rank. Raises ValueError if a rank would hold none."""
    if vocab_size < tp.size:
        raise ValueError(f"vocab_size = {vocab_size} is smaller than tp = {tp.size}")
    counts = even_counts(vocab_size, tp.size)
    first = sum(counts[: tp.rank])
    return first, first + counts[tp.rank]


def vocab_table(
    name: str, vocab_size: int, hidden: int, context: LayerContext, *, std: float, writes: bool = True
) -> LogicalParameter:
    """The rows of a `[vocab_size, hidden]` table that this rank holds."""
    first, stop = vocab_range(vocab_size, context.tp)
    rows = Rectangle(name, (vocab_size, hidden), (first, 0), (stop - first, hidden))
    placement = Placement((rows,), writes=writes)
    return make_parameter((stop - first, hidden), placement, normal_init(std), context.dtype, context.device)


class _LookUpApart(torch.autograd.Function):
    """Rows of the table; their gradient is added to `main_grad` in FP32 or FP64, apart from other look-ups.

    autograd adds the gradients of all uses of a parameter in the parameter's type, BF16, before anybody sees them.
    There one of a loss of scale 0.05 is rounded away beside one of scale 1.
    """

    @staticmethod
    def forward(ctx: Any, ids_T: Tensor, weight: LogicalParameter) -> Tensor:
        ctx.save_for_backward(ids_T)
        ctx.weight = weight
        return F.embedding(ids_T, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        (ids_T,) = ctx.saved_tensors
        weight: LogicalParameter = ctx.weight
        main_grad = weight.main_grad
        wide = grads[0].dtype if main_grad is None else torch.promote_types(main_grad.dtype, torch.float32)
        dy_TD = grads[0].to(wide)
        dw_VD = torch.ops.aten.embedding_dense_backward(dy_TD, ids_T, weight.shape[0], -1, False)
        if main_grad is None:
            return None, dw_VD
        main_grad.add_(dw_VD)
        if weight.grad_ready is not None:
            weight.grad_ready()
        return None, None


class VocabParallelEmbedding(nn.Module):
    """Token ids `[B, S] -> x_TD [T/tp, D]`: each rank looks up its rows, the sums are scattered over rows.

    weight: this rank's rows of the table (`vocab_table`).
    """

    def __init__(self, vocab_size: int, weight: LogicalParameter, context: LayerContext) -> None:
        super().__init__()
        self._tp = context.tp
        self._first, self._stop = vocab_range(vocab_size, context.tp)
        self.weight = weight

    def forward(self, ids_BS: Tensor, *, apart: bool = False) -> Tensor:
        """apart: add the gradient of this look-up to `main_grad` for itself, not together with those of others."""
        ids_T = ids_BS.reshape(-1)
        look_up = _LookUpApart.apply if apart else F.embedding
        if self._tp.size == 1:
            return look_up(ids_T, self.weight)
        is_local_T = (ids_T >= self._first) & (ids_T < self._stop)
        local_T = (ids_T - self._first).clamp(0, self._stop - self._first - 1)
        x_TD = look_up(local_T, self.weight).masked_fill(~is_local_T[:, None], 0.0)
        return scatter_sum_rows(x_TD, self._tp)


class VocabParallelHead(ColumnParallelLinear):
    """x_TD `[T/tp, D]` -> logits_TV `[T, V/tp]` of this rank's vocabulary rows, which need not be equally many.

    weight: this rank's rows of the table; the embedding's if the two are tied.
    """

    def __init__(self, vocab_size: int, hidden: int, weight: LogicalParameter, context: LayerContext) -> None:
        first, stop = vocab_range(vocab_size, context.tp)
        rows = torch.arange(first, stop, device=context.device)
        ParallelLinear.__init__(self, context, column_sharding("head", rows, hidden, context), weight)
