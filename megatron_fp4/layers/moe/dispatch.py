"""Rows to the experts that a router has chosen for them, and back.

    dispatch   x_TD, k choices a token  ->  x_RD, sorted by (expert, segment, address), cut into segments
    combine    y_RD  ->  y_TD: the k results of a token are added in the order of their experts and rounded once

Both are moves of rows, and each is the other's backward pass. Sorted by addresses, the rows of a segment are the same,
in the same order, whatever rank they came from.

Here all experts are on the rank of the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import even_counts
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.moe.router import Routes
from megatron_fp4.precision.grouped import Segments


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Rows at their experts. weight_R: FP32, the router's. rows: int64 `[R]`, addresses of their tokens. moves: how
    they came."""

    x_RD: Tensor
    weight_R: Tensor
    rows: Tensor
    segments: Segments
    moves: Moves


@dataclass(frozen=True, eq=False)
class Moves:
    """token_R: int64, the row of x that each row is a copy of. place_Tk: int64 `[T, k]`, where the copies of a row of x
    are, in the order of their experts; -1 for one that was dropped."""

    token_R: Tensor
    place_Tk: Tensor


class _Spread(torch.autograd.Function):
    """x_TD -> x_RD; backward: the gradients of a row's copies are added."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return x_TD[moves.token_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _added(grads[0], ctx.moves.place_Tk), None


class _Collect(torch.autograd.Function):
    """y_RD -> y_TD; backward: every copy of a row gets its gradient."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, moves: Moves) -> Tensor:
        ctx.moves = moves
        return _added(y_RD, moves.place_Tk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.moves.token_R], None


def _added(y_RD: Tensor, place_Tk: Tensor) -> Tensor:
    """`[T, D]`: the sum of the rows at `place_Tk`, one after the other in FP32 (of FP32 rows in FP64), rounded once."""
    total = y_RD.new_zeros(
        (len(place_Tk), y_RD.shape[1]), dtype=torch.float64 if y_RD.dtype == torch.float32 else torch.float32
    )
    if len(y_RD):
        for place_T in place_Tk.unbind(1):
            total += y_RD[place_T.clamp(min=0)].masked_fill_((place_T < 0)[:, None], 0.0)
    return total.to(y_RD.dtype)


def dispatch(x_TD: Tensor, routes: Routes, address_T: Tensor, config: MoeConfig) -> Arrivals:
    """Send each row to its experts. address_T: int64, of the tokens. Reads the number of rows per segment back."""
    T, k = routes.experts_Tk.shape
    with torch.no_grad():
        by_address_T = address_T.argsort(stable=True)
        experts_M = routes.experts_Tk
        if routes.kept_Tk is not None:
            experts_M = experts_M.masked_fill(~routes.kept_Tk, config.num_experts)
        experts_M = experts_M[by_address_T].flatten()
        order_M = experts_M.argsort(stable=True)
        choice_M = (by_address_T[:, None] * k + torch.arange(k, device=x_TD.device)).flatten()[order_M]
        segments = _segments(experts_M[order_M], address_T[choice_M // k], config)
        choice_R = choice_M[: segments.num_rows]
        place_Tk = torch.full((T * k,), -1, dtype=torch.int64, device=x_TD.device)
        place_Tk[choice_R] = torch.arange(len(choice_R), device=x_TD.device)
        moves = Moves(choice_R // k, place_Tk.view(T, k))
    x_RD: Tensor = _Spread.apply(x_TD, moves)
    weight_R = routes.weights_Tk.flatten().index_select(0, choice_R)
    return Arrivals(x_RD, weight_R, address_T[moves.token_R], segments, moves)


def combine(y_RD: Tensor, arrivals: Arrivals) -> Tensor:
    """The results of each token's experts, added: `[T, D]`."""
    y_TD: Tensor = _Collect.apply(y_RD, arrivals.moves)
    return y_TD


def _segments(experts_M: Tensor, address_M: Tensor, config: MoeConfig) -> Segments:
    """experts_M: ascending; `num_experts` for what was dropped. address_M: ascending within an expert. Without data, on
    the meta device, all experts are sent as much."""
    if experts_M.is_meta:
        return Segments.of_counts([[count] for count in even_counts(len(experts_M), config.num_experts)])
    source_M, num_sources = torch.zeros_like(address_M), 1
    if config.segment_tokens:
        sources, source_M = (address_M // config.segment_tokens).unique(return_inverse=True)
        num_sources = len(sources)
    counts = torch.zeros((config.num_experts + 1) * num_sources, dtype=torch.int64, device=experts_M.device)
    counts.scatter_add_(0, experts_M * num_sources + source_M, torch.ones_like(experts_M))
    return Segments.of_counts(counts.view(-1, num_sources)[:-1].tolist())
