"""Experts: feed-forward networks side by side, each for the rows that a router has sent to it.

Two linears of many weights (`GroupedLinear`), one logical tensor per expert and weight (`...experts.7.up.weight`), but
one linear for the precision plan (`...experts.up`). An expert is whole on one rank; its numbers do not depend on which.

Shape letters beside those of `layer_context`: R rows that came to this rank's experts, sorted by (expert, source,
address); E experts on this rank.

Not here: who sends which row to whom, and the sum of what comes back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rect import Placement, Rectangle, split_evenly
from megatron_fp4.layers.fused.pointwise import PointwiseImpl, pointwise_runner
from megatron_fp4.layers.layer_context import LayerContext, widen
from megatron_fp4.layers.linear import ParallelLinear
from megatron_fp4.layers.mlp import Activation, squared_relu, swiglu
from megatron_fp4.layers.parameter import make_parameter, normal_init
from megatron_fp4.layers.recompute import recomputing, run_recomputed
from megatron_fp4.precision.grouped import GroupedWeightCache, Segments, grouped_linear
from megatron_fp4.precision.sharding import Sharding


class GroupedLinear(ParallelLinear):
    """`[R, K] -> [R, N]`, each row by the weight of its expert.

    name: `blocks.3.moe.experts` and role `up` give the linear `blocks.3.moe.experts.up` and the logical tensors
    `blocks.3.moe.experts.7.up.weight`, [N, K]; with several outputs, one below the other, `...7.gate_up.gate.weight`.
    num_experts: of all ranks of `ep`, which hold equal shares in order. Raises ValueError if they cannot.
    """

    def __init__(
        self,
        name: str,
        role: str,
        in_features: int,
        outputs: Mapping[str, int],
        context: LayerContext,
        *,
        num_experts: int,
        ep: Group,
        std: float,
    ) -> None:
        local = split_evenly(num_experts, ep, what=f"{name}: number of experts")
        first = ep.rank * local
        rectangles = [
            Rectangle.whole(f"{name}.{expert}.{role}.{part + '.' if part else ''}weight", (rows, in_features))
            for expert in range(first, first + local)
            for part, rows in outputs.items()
        ]
        placement = Placement(tuple(rectangles), of_experts=True)
        shape = (placement.num_rows, in_features)
        weight = make_parameter(shape, placement, normal_init(std), context.dtype, context.device)
        alone = Group.single("expert", context.tp.ranks[context.tp.rank])
        sharding = Sharding(
            name=f"{name}.{role}",
            x_group=alone,
            w_group=alone,
            dy_group=alone,
            n_index=torch.arange(sum(outputs.values()), device=context.device),
            k_index=torch.arange(in_features, device=context.device),
        )
        super().__init__(context, sharding, weight)
        self._grouped_cache = GroupedWeightCache(local, first)

    def extra_repr(self) -> str:
        """See `ParallelLinear.extra_repr`; beside it the number of experts."""
        return f"{super().extra_repr()}, {self._grouped_cache.num_experts} experts"

    def forward(self, x_RK: Tensor, rows: Tensor, segments: Segments) -> Tensor:
        """rows: int64 `[R]` addresses of the tokens."""
        context = self._context
        y_RN = grouped_linear(
            widen(x_RK),
            self.weight,
            rows=rows,
            segments=segments,
            sharding=self.sharding,
            precision=self.precision,
            backend=context.backend,
            clock=context.clock,
            cache=self._grouped_cache,
            queue=context.queue,
        )
        return y_RN.to(x_RK.dtype)


class GroupedExperts(nn.Module):
    """`down(weight * act(up(x)))`: x_RD `[R, D]` -> `[R, D]`, each row through its expert.

    name: `blocks.3.moe.experts`. width: D, hidden or latent. The router's weight of a row multiplies the activation, as
    in Megatron-LM, so that the gradient that comes to `down` does not depend on the router.
    recompute_core: an attribute that may be set (recompute.py).
    """

    def __init__(
        self,
        name: str,
        width: int,
        ffn_hidden: int,
        activation: Activation,
        context: LayerContext,
        *,
        num_experts: int,
        ep: Group,
        std: float,
        out_std: float,
        impl: PointwiseImpl = PointwiseImpl.torch,
    ) -> None:
        super().__init__()
        self.recompute_core = False
        self._run = pointwise_runner(impl, context)
        self._gated = activation is Activation.swiglu
        outputs = {"gate": ffn_hidden, "up": ffn_hidden} if self._gated else {"": ffn_hidden}
        role = "gate_up" if self._gated else "up"
        self.up = GroupedLinear(name, role, width, outputs, context, num_experts=num_experts, ep=ep, std=std)
        self.down = GroupedLinear(
            name, "down", ffn_hidden, {"": width}, context, num_experts=num_experts, ep=ep, std=out_std
        )

    def forward(self, x_RD: Tensor, weight_R: Tensor, rows: Tensor, segments: Segments) -> Tensor:
        """weight_R: FP32, the router's weight of each row, whose gradient is returned to it. rows: token addresses."""

        def core(u_RF: Tensor) -> Tensor:
            return self._activate(u_RF, weight_R)

        u_RF = self.up(x_RD, rows, segments)
        h_RF = run_recomputed(self._activate, u_RF, weight_R, when=self.recompute_core)
        with recomputing(core, u_RF, h_RF, when=self.recompute_core):
            return self.down(h_RF, rows, segments)

    def _activate(self, u_RF: Tensor, weight_R: Tensor) -> Tensor:
        weight_R1 = (widen(weight_R) if u_RF.dtype == torch.float32 else weight_R)[:, None]
        return self._run(weighted_swiglu if self._gated else weighted_squared_relu, u_RF=u_RF, weight_R1=weight_R1)


def weighted_squared_relu(u_RF: Tensor, weight_R1: Tensor) -> Tensor:
    """relu(u)^2 * weight, in the wider type, rounded once to that of u."""
    return (squared_relu(u_RF) * weight_R1).to(u_RF.dtype)


def weighted_swiglu(u_RF: Tensor, weight_R1: Tensor) -> Tensor:
    """silu(gate) * up * weight, `[R, F]`, of gate | up, `[R, 2 F]`; see `weighted_squared_relu`."""
    return (swiglu(u_RF) * weight_R1).to(u_RF.dtype)
