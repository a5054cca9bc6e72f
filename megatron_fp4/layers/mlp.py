"""Feed-forward layers: squared ReLU (the paper's models) and SwiGLU."""

from __future__ import annotations

from enum import Enum

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_fp4.layers.fused.pointwise import PointwiseImpl, pointwise_runner
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import ColumnParallelLinear, RowParallelLinear
from megatron_fp4.layers.recompute import recomputing, run_recomputed


class Activation(Enum):
    """What an MLP computes between its two linears."""

    squared_relu = "squared_relu"  # relu(up)^2
    swiglu = "swiglu"  # silu(gate) * up


class MLP(nn.Module):
    """`down(act(up(x)))`: x_TD `[T/tp, D]` -> `[T/tp, D]`.

    SwiGLU fuses gate and up into one column-parallel weight with two named parts. impl: who computes the activation.
    recompute_core: an attribute that may be set (recompute.py).
    """

    def __init__(
        self,
        name: str,
        hidden: int,
        ffn_hidden: int,
        activation: Activation,
        context: LayerContext,
        *,
        std: float,
        out_std: float,
        impl: PointwiseImpl = PointwiseImpl.torch,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.recompute_core = False
        self._run = pointwise_runner(impl, context)
        gated = activation is Activation.swiglu
        outputs = {"gate": ffn_hidden, "up": ffn_hidden} if gated else {"": ffn_hidden}
        self.up = ColumnParallelLinear(f"{name}.{'gate_up' if gated else 'up'}", hidden, outputs, context, std=std)
        self.down = RowParallelLinear(f"{name}.down", ffn_hidden, hidden, context, std=out_std)

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        u_TF = self.up(x_TD, tokens)
        h_TF = run_recomputed(self._activate, u_TF, when=self.recompute_core)
        with recomputing(self._activate, u_TF, h_TF, when=self.recompute_core):
            return self.down(h_TF, tokens)

    def _activate(self, u_TF: Tensor) -> Tensor:
        return self._run(swiglu if self.activation is Activation.swiglu else squared_relu, u_TF=u_TF)


def squared_relu(u_TF: Tensor) -> Tensor:
    """relu(u)^2."""
    return F.relu(u_TF).square()


def swiglu(u_TF: Tensor) -> Tensor:
    """silu(gate) * up, `[T, F]`, of gate | up, `[T, 2 F]`."""
    gate_TF, up_TF = u_TF.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF
