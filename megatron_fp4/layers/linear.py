"""Column- and row-parallel linear layers, sequence-parallel throughout.

The GEMM function knows no layout and the collective knows no format. What crosses between them is the `Sharding`: over
which ranks each operand is spread (for its largest magnitude) and which logical rows and columns this rank holds (for
the address of its rounding noise). What is gathered, multiplied and summed stands in the two classes, with T tokens of
this context-parallel rank, N output and K input features; `/tp` marks the dimension that tensor parallelism shards.

`linear.precision` is a plain value that may be assigned at any time. Only the projection of queries, keys and values
may have a bias, as that of Qwen 2 has; it is added in the compute dtype, after the GEMM.

Not here: the three GEMMs (precision/linear_op.py), the sums of weight gradients over data-parallel ranks (optim).
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
from megatron_fp4.layers.parameter import constant_init, make_parameter, normal_init
from megatron_fp4.precision.linear_op import quantized_linear
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.precision.weight_cache import WeightCache
from megatron_fp4.precision.wgrad import WgradPlan, WgradQueue


class ParallelLinear(nn.Module):
    """What both kinds share: the weight, its sharding, its precision, and the three GEMMs."""

    def __init__(self, context: LayerContext, sharding: Sharding, weight: LogicalParameter) -> None:
        super().__init__()
        self.sharding = sharding
        self.precision = LinearPrecision()
        self.weight = weight
        self.bias: LogicalParameter | None = None
        self.input_amax: Tensor | None = None
        """FP32 scalar, of which a static scale of the input is made; None: not measured."""
        self._context = context
        self._cache = WeightCache()

    @property
    def name(self) -> str:
        """Logical name, the same on every rank: `blocks.3.mlp.up`."""
        return self.sharding.name

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer: its name, the features on this rank, and its precision."""
        rows, columns = len(self.sharding.n_index), len(self.sharding.k_index)
        here = " on this rank" if self._context.tp.size > 1 else ""
        high = str(self._context.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        return f"{self.name}, {columns} -> {rows}{here}, {self.precision if self.precision.quantized else high}"

    def gemm(self, x_TK: Tensor, rows: Tensor, queue: WgradQueue | None) -> Tensor:
        """`[T, K_local] -> [T, N_local]` in the layer's precision. rows: int64 `[T]`, their addresses. queue: where
        Wgrad waits; None: nowhere."""
        context = self._context
        return quantized_linear(
            x_TK,
            self.weight,
            rows=rows,
            sharding=self.sharding,
            precision=self.precision,
            backend=context.backend,
            clock=context.clock,
            cache=self._cache,
            queue=queue,
            input_amax=self.input_amax,
        )


class ColumnParallelLinear(ParallelLinear):
    """Output features sharded over tp: `x [T/tp, K] -> y [T, N/tp]`.

        forward   y  [T, N/tp] = gather(x) w^T         x [T/tp, K], w [N/tp, K];  rows of x are all-gathered over tp
        dgrad     dx [T/tp, K] = scatter_sum(dy w)     dy [T, N/tp];              rows are reduce-scattered over tp
        wgrad     dw [N/tp, K] = dy^T gather(x)        x as it was gathered in the forward pass; no collective

    With `WgradPlan.while_scattering`, Wgrad is computed while dx travels: it waits in a queue of this one call, which
    the backward of the gather empties between the start and the end of its reduce-scatter. The same GEMMs run in the
    same order, so no bit changes. Nothing else of a pair of linears can be hidden without cutting a GEMM into pieces: a
    gather comes right before the GEMM that needs it, a scatter right after the one that makes it.

    outputs: logical output features per named part, e.g. {"q": 2048, "k": 512, "v": 512} or {"": 8192} for an unnamed
    one. Each part is sharded on its own, so that a rank holds its heads of q, k and v side by side; the parts are
    separate tensors (`<name>.q.weight`) in checkpoints. bias: add one to each part (`<name>.q.bias`), 0 at first.
    Raises ValueError if a part does not divide by tp.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        outputs: Mapping[str, int],
        context: LayerContext,
        *,
        std: float,
        bias: bool = False,
    ) -> None:
        tp = context.tp
        rectangles: list[Rectangle] = []
        biases: list[Rectangle] = []
        n_index: list[Tensor] = []
        first_of_part = 0
        for part, out_features in outputs.items():
            label = f"{name}.{part}" if part else name
            rows = split_evenly(out_features, tp, what=f"{label} output features")
            offset = tp.rank * rows
            rectangles.append(
                Rectangle(f"{label}.weight", (out_features, in_features), (offset, 0), (rows, in_features))
            )
            biases.append(Rectangle(f"{label}.bias", (out_features,), (offset,), (rows,)))
            n_index.append(torch.arange(rows, device=context.device) + first_of_part + offset)
            first_of_part += out_features
        placement = Placement(tuple(rectangles))
        shape = (placement.num_rows, in_features)
        weight = make_parameter(shape, placement, normal_init(std), context.dtype, context.device)
        super().__init__(context, column_sharding(name, torch.cat(n_index), in_features, context), weight)
        if bias:
            placed = Placement(tuple(biases), decay=False)
            self.bias = make_parameter(shape[:1], placed, constant_init(0.0), context.dtype, context.device)

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        context = self._context
        if context.wgrad is WgradPlan.while_scattering and x_TD.requires_grad:  # without dx nothing would travel
            queue = WgradQueue()
            x_TK = gather_rows(widen(x_TD), context.tp, while_sending=queue.drain)
            y_TN = self.gemm(x_TK, tokens.rows, queue)
        else:
            y_TN = self.gemm(gather_rows(widen(x_TD), context.tp), tokens.rows, context.queue)
        return (y_TN if self.bias is None else y_TN + widen(self.bias)).to(x_TD.dtype)


class RowParallelLinear(ParallelLinear):
    """Input features sharded over tp: `x [T, K/tp] -> y [T/tp, N]`.

        forward   y  [T/tp, N] = scatter_sum(x w^T)    x [T, K/tp], w [N, K/tp];  rows are reduce-scattered over tp
        dgrad     dx [T, K/tp] = gather(dy) w          dy [T/tp, N];              rows of dy are all-gathered over tp
        wgrad     dw [N, K/tp] = gather(dy)^T x        dy as it was gathered for dgrad; no collective

    Raises ValueError if K does not divide by tp.
    """

    def __init__(self, name: str, in_features: int, out_features: int, context: LayerContext, *, std: float) -> None:
        tp = context.tp
        columns = split_evenly(in_features, tp, what=f"{name} input features")
        offset = tp.rank * columns
        shape = (out_features, columns)
        placement = Placement((Rectangle(f"{name}.weight", (out_features, in_features), (0, offset), shape),))
        weight = make_parameter(shape, placement, normal_init(std), context.dtype, context.device)
        sharding = Sharding(
            name=name,
            x_group=context.tp_cp,
            w_group=tp,
            dy_group=context.cp,
            n_index=torch.arange(out_features, device=context.device),
            k_index=torch.arange(columns, device=context.device) + offset,
            tokens=context.cp,
        )
        super().__init__(context, sharding, weight)

    def forward(self, x_TK: Tensor, tokens: Tokens) -> Tensor:
        y_TN = self.gemm(widen(x_TK), tokens.rows, self._context.queue)
        return scatter_sum_rows(y_TN, self._context.tp).to(x_TK.dtype)


class ReplicatedLinear(ParallelLinear):
    """The whole weight on every tensor-parallel rank, each on its own rows: `x [T/tp, K] -> y [T/tp, N]`.

        forward   y  [T/tp, N] = x w^T                 no collective
        dgrad     dx [T/tp, K] = dy w                  no collective
        wgrad     dw [N, K]    = dy^T x                of these rows; the optimizer sums it over tp, once a step

    For small products between two tensors whose rows are sharded already. Quantized, the T/tp rows of a rank must be
    whole blocks.
    """

    def __init__(self, name: str, in_features: int, out_features: int, context: LayerContext, *, std: float) -> None:
        shape = (out_features, in_features)
        placement = Placement((Rectangle.whole(f"{name}.weight", shape),), tp_replicated=True)
        weight = make_parameter(shape, placement, normal_init(std), context.dtype, context.device)
        sharding = Sharding(
            name=name,
            x_group=context.tp_cp,
            w_group=Group.single(),
            dy_group=context.tp_cp,
            n_index=torch.arange(out_features, device=context.device),
            k_index=torch.arange(in_features, device=context.device),
            tokens=context.tp_cp,
        )
        super().__init__(context, sharding, weight)

    def forward(self, x_TK: Tensor, tokens: Tokens) -> Tensor:
        context = self._context
        return self.gemm(widen(x_TK), tokens.local_rows(context.tp), context.queue).to(x_TK.dtype)


def column_sharding(name: str, n_index: Tensor, in_features: int, context: LayerContext) -> Sharding:
    """The sharding of a column-parallel linear. n_index: the logical output feature of each row on this rank."""
    return Sharding(
        name=name,
        x_group=context.cp,
        w_group=context.tp,
        dy_group=context.tp_cp,
        n_index=n_index,
        k_index=torch.arange(in_features, device=context.device),
        tokens=context.cp,
    )


def linears_of(model: nn.Module) -> dict[str, ParallelLinear]:
    """All parallel linears of a model (or of this rank's stages), by logical name, in order."""
    return {module.name: module for module in model.modules() if isinstance(module, ParallelLinear)}


def assign_precision(model: nn.Module, table: PrecisionTable) -> None:
    """Give every linear of `model` its precision from the table."""
    precisions = table.by_name
    for name, linear in linears_of(model).items():
        linear.precision = precisions[name]


def assign_input_amax(model: nn.Module, values: Mapping[str, float]) -> None:
    """Give the linears of `model` that `values` names the largest magnitude that their inputs had."""
    for name, linear in linears_of(model).items():
        if name in values:
            linear.input_amax = torch.tensor(values[name], dtype=torch.float32, device=linear.weight.device)
