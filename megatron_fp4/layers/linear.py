"""Column- and row-parallel linear layers, sequence-parallel throughout.

                    x            weight [N, K]              y             collective
    Column     rows gathered     rows sharded over tp       [T, N/tp]     gather rows before the GEMM
    Row        [T, K/tp]         columns sharded over tp    [T/tp, N]     reduce-scatter rows after it

One idea: the GEMM function knows no layout and the collective knows no format. What crosses between them is the
`Sharding`: over which ranks each operand is spread (for its largest magnitude) and which logical rows and columns
this rank holds (for the address of its rounding noise).

With `context.overlap` the backward pass of a column-parallel linear computes Wgrad while dx travels: Wgrad is put into
a queue of that one call, and the backward of the gather empties it between the start and the end of its reduce-scatter.
The same GEMMs run in the same order, so no bit changes. Nothing else of a pair of linears can be hidden without cutting
a GEMM into pieces: a gather comes right before the GEMM that needs it, a scatter right after the one that makes it. The
gathered x is kept for Wgrad, not gathered a second time.

`linear.precision` is a plain value that may be assigned at any time. There is no bias: none of the paper's models has
one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_fp4.comm.autograd import gather_rows, scatter_sum_rows
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle, split_evenly
from megatron_fp4.layers.layer_context import LayerContext, Tokens, widen
from megatron_fp4.layers.parameter import make_parameter, normal_init
from megatron_fp4.precision.linear_op import quantized_linear
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.precision.weight_cache import WeightCache
from megatron_fp4.precision.wgrad import WgradQueue


class ParallelLinear(nn.Module):
    """What both kinds share: the weight, its sharding, its precision, and the three GEMMs."""

    weight: LogicalParameter

    def __init__(self, context: LayerContext, sharding: Sharding) -> None:
        super().__init__()
        self.sharding = sharding
        self.precision = LinearPrecision()
        self._context = context
        self._cache = WeightCache()

    @property
    def name(self) -> str:
        """Logical name, the same on every rank: `blocks.3.mlp.up`."""
        return self.sharding.name

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer: its name, the features on this rank, and its precision."""
        rows, columns = self.weight.shape
        here = " on this rank" if self._context.tp.size > 1 else ""
        return f"{self.name}, {columns} -> {rows}{here}, {self.precision}"

    def gemm(self, x_TK: Tensor, tokens: Tokens, queue: WgradQueue) -> Tensor:
        """`[T, K_local] -> [T, N_local]` in the layer's precision."""
        context = self._context
        return quantized_linear(
            x_TK,
            self.weight,
            rows=tokens.rows,
            sharding=self.sharding,
            precision=self.precision,
            backend=context.backend,
            clock=context.clock,
            cache=self._cache,
            queue=queue,
        )


class ColumnParallelLinear(ParallelLinear):
    """Output features sharded over tp: `x [T/tp, K] -> y [T, N/tp]`.

    outputs: logical output features per named part, e.g. {"q": 2048, "k": 512, "v": 512} or {"": 8192} for an unnamed
    one. Each part is sharded on its own, so that a rank holds its heads of q, k and v side by side; the parts are
    separate tensors (`<name>.q.weight`) in checkpoints. Raises ValueError if a part does not divide by tp.
    """

    def __init__(
        self, name: str, in_features: int, outputs: Mapping[str, int], context: LayerContext, *, std: float
    ) -> None:
        tp = context.tp
        rectangles: list[Rectangle] = []
        n_index: list[Tensor] = []
        first_row = first_logical = 0
        for part, out_features in outputs.items():
            label = f"{name}.{part}" if part else name
            rows = split_evenly(out_features, tp, what=f"{label} output features")
            offset = tp.rank * rows
            shape = (out_features, in_features)
            rectangles.append(Rectangle(f"{label}.weight", shape, (offset, 0), (rows, in_features)))
            n_index.append(torch.arange(rows, device=context.device) + first_logical + offset)
            first_row += rows
            first_logical += out_features
        sharding = Sharding(
            name=name,
            x_group=context.cp,
            w_group=tp,
            dy_group=context.tp_cp,
            n_index=torch.cat(n_index),
            k_index=torch.arange(in_features, device=context.device),
        )
        super().__init__(context, sharding)
        placement = Placement(tuple(rectangles))
        self.weight = make_parameter(
            (first_row, in_features), placement, normal_init(std), context.dtype, context.device
        )

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        tp, queue = self._context.tp, self._context.queue
        if not self._context.overlap or queue.enabled or not x_TD.requires_grad:  # without dx nothing would travel
            return self.gemm(gather_rows(widen(x_TD), tp), tokens, queue).to(x_TD.dtype)
        beside = WgradQueue(enabled=True)
        return self.gemm(gather_rows(widen(x_TD), tp, beside.drain), tokens, beside).to(x_TD.dtype)


class RowParallelLinear(ParallelLinear):
    """Input features sharded over tp: `x [T, K/tp] -> y [T/tp, N]`. Raises ValueError if K does not divide by tp."""

    def __init__(self, name: str, in_features: int, out_features: int, context: LayerContext, *, std: float) -> None:
        tp = context.tp
        columns = split_evenly(in_features, tp, what=f"{name} input features")
        offset = tp.rank * columns
        sharding = Sharding(
            name=name,
            x_group=context.tp_cp,
            w_group=tp,
            dy_group=context.cp,
            n_index=torch.arange(out_features, device=context.device),
            k_index=torch.arange(columns, device=context.device) + offset,
        )
        super().__init__(context, sharding)
        rectangle = Rectangle(f"{name}.weight", (out_features, in_features), (0, offset), (out_features, columns))
        self.weight = make_parameter(
            (out_features, columns), Placement((rectangle,)), normal_init(std), context.dtype, context.device
        )

    def forward(self, x_TK: Tensor, tokens: Tokens) -> Tensor:
        return scatter_sum_rows(self.gemm(widen(x_TK), tokens, self._context.queue), self._context.tp).to(x_TK.dtype)


def linears_of(model: nn.Module) -> dict[str, ParallelLinear]:
    """All parallel linears of a model (or of this rank's stages), by logical name, in order."""
    return {module.name: module for module in model.modules() if isinstance(module, ParallelLinear)}


def assign_precision(model: nn.Module, table: PrecisionTable) -> None:
    """Give every linear of `model` its precision from the table."""
    precisions = table.by_name
    for name, linear in linears_of(model).items():
        linear.precision = precisions[name]


def amax_groups(linear: ParallelLinear) -> tuple[Group, Group, Group]:
    """The groups over which the largest magnitude of (x, weight, dy) is shared; for reports."""
    return linear.sharding.x_group, linear.sharding.w_group, linear.sharding.dy_group
