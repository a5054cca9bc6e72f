"""A mixture of experts: each token through the few experts that its router chooses, and through the shared one.

    y = up(sum over chosen e of expert_e(down(x), weight_e)) + shared(x)        down, up: latent projections, if any

Router and shared expert see x in the model's width; rows travel, and experts work, in the latent width (LatentMoE, as
in Nemotron 3).
"""

from __future__ import annotations

from torch import Tensor, nn

from megatron_fp4.layers.fused.pointwise import PointwiseImpl
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import ReplicatedLinear
from megatron_fp4.layers.mlp import MLP, Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.moe.dispatch import combine, dispatch
from megatron_fp4.layers.moe.experts import GroupedExperts
from megatron_fp4.layers.moe.router import Router


class MixtureOfExperts(nn.Module):
    """x_TD `[T/tp, D]` -> `[T/tp, D]`.

    name: `blocks.3.moe`; its parts are `.router`, `.latent.down`, `.experts`, `.latent.up` and `.shared`. out_std: of
    weights whose results go into the residual stream.
    """

    def __init__(
        self,
        name: str,
        config: MoeConfig,
        hidden: int,
        activation: Activation,
        context: LayerContext,
        *,
        std: float,
        out_std: float,
        impl: PointwiseImpl = PointwiseImpl.torch,
    ) -> None:
        super().__init__()
        self.config = config
        self._context = context
        width = config.latent or hidden
        self.router = Router(f"{name}.router", config, hidden, context, std=std)
        self.latent_down: ReplicatedLinear | None = None
        self.latent_up: ReplicatedLinear | None = None
        self.shared: MLP | None = None
        if config.latent:
            self.latent_down = ReplicatedLinear(f"{name}.latent.down", hidden, width, context, std=std)
        self.experts = GroupedExperts(
            f"{name}.experts",
            width,
            config.ffn_hidden,
            activation,
            context,
            num_experts=config.num_experts,
            ep=context.ep,
            std=std,
            out_std=std if config.latent else out_std,
            impl=impl,
        )
        if config.latent:
            self.latent_up = ReplicatedLinear(f"{name}.latent.up", width, hidden, context, std=out_std)
        if config.shared_ffn_hidden:
            inner = config.shared_ffn_hidden
            self.shared = MLP(f"{name}.shared", hidden, inner, activation, context, std=std, out_std=out_std, impl=impl)

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        routes = self.router(x_TD, tokens)
        x_TL = x_TD if self.latent_down is None else self.latent_down(x_TD, tokens)
        arrivals = dispatch(x_TL, routes, tokens.local_rows(self._context.tp), self.config, self._context)
        y_RL = self.experts(arrivals.x_RD, arrivals.weight_R, arrivals.rows, arrivals.segments)
        y_TD = combine(y_RL, arrivals)
        if self.latent_up is not None:
            y_TD = self.latent_up(y_TD, tokens)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD, tokens)
