"""Dropout whose mask has an address: the same under any layout, recompute and resume."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.numerics.random import key_of, uniform


class Dropout(nn.Module):
    """Drop elements of x_TD `[T/tp, D]` with probability `p` and scale the rest by 1 / (1 - p), in training mode."""

    def __init__(self, name: str, p: float, context: LayerContext) -> None:
        super().__init__()
        self._name = name
        self._p = p
        self._context = context

    def extra_repr(self) -> str:
        return f"p={self._p}"

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Tensor:
        if self._p == 0.0 or not self.training:
            return x_TD
        clock = self._context.clock
        columns = torch.arange(x_TD.shape[-1], device=x_TD.device)
        draw = uniform(key_of(clock.seed, clock.step, self._name), tokens.local_rows(self._context.tp), columns)
        return x_TD * (draw >= self._p).to(x_TD.dtype) / (1.0 - self._p)
