"""Rows to the experts that a router has chosen for them, and back.

    dispatch   x_TD, k choices a token  ->  x_RD, sorted by (expert, segment, address), cut into segments
    combine    y_RD  ->  y_TD: the k results of a token are added in the order of their experts and rounded once

Both are moves of rows, and each is the other's backward pass. Sorted by addresses, the rows of a segment are the same,
in the same order, whatever rank they came from.

Where ranks share the experts, a row travels as bytes: activation, FP32 weight and address in one message each way, for
each layer and microbatch; backward it is the gradients of both, then of the results. Before the first goes a count of
rows for each expert, which shapes everything after it: the host reads it back, once. Neither sum nor order of anything
depends on who shares them.

Beside the shape letters of `layer_context`: T rows of this rank (T/tp there), k experts of each, M rows that leave, in
the order of their experts and addresses, R rows that have come to experts here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.row_exchange import RowExchange, together
from megatron_fp4.layers.layer_context import PLACE_BITS, ROUND_BITS, LayerContext, place_of
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.moe.router import Routes
from megatron_fp4.precision.grouped import Segments


@dataclass(frozen=True, eq=False)
class Moves:
    """How rows travel. choice_M: int64, the choice (row of x times k, plus which) that leaves at each place. place_Tk:
    int64 `[T, k]`, the inverse, in the order of the experts; -1 for a choice that was dropped. key_M: address, and
    in it the expert above the place."""

    exchange: RowExchange
    choice_M: Tensor
    place_Tk: Tensor
    key_M: Tensor

    @property
    def travel(self) -> bool:
        """Whether other ranks have experts too."""
        return self.exchange.group.size > 1

    @property
    def token_M(self) -> Tensor:
        """The row of x that leaves at each place."""
        return self.choice_M // self.place_Tk.shape[1]


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Rows at their experts. weight_R: FP32, the router's. rows: int64 `[R]`, addresses of their tokens. order_R: which
    arrival each row was. moves: how they came."""

    x_RD: Tensor
    weight_R: Tensor
    rows: Tensor
    segments: Segments
    order_R: Tensor
    moves: Moves


class _ToExperts(torch.autograd.Function):
    """x_TD, weight_Tk -> x_RD, weight_R, key_R, order_R; backward: the gradients of a row's copies are added."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_Tk: Tensor, moves: Moves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = [x_TD[moves.token_M], weight_Tk.flatten()[moves.choice_M], moves.key_M]
        order_R = torch.empty_like(moves.key_M)
        if moves.travel:
            rows = together(rows, moves.exchange.deliver)
            order_R = rows[-1].argsort()
            rows = [each[order_R] for each in rows]
        ctx.moves, ctx.order_R = moves, order_R
        ctx.mark_non_differentiable(rows[-1], order_R)
        return rows[0], rows[1], rows[2], order_R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        moves: Moves = ctx.moves
        rows = list(grads[:2])
        if moves.travel:
            rows = together([_unsorted(each, ctx.order_R) for each in rows], moves.exchange.back)
        dx_MD, dweight_M = rows
        dweight_C = dweight_M.new_zeros(moves.place_Tk.numel()).index_copy_(0, moves.choice_M, dweight_M)
        return _added(dx_MD, moves.place_Tk), dweight_C.view(moves.place_Tk.shape), None


class _FromExperts(torch.autograd.Function):
    """y_RD -> y_TD; backward: every copy of a row gets its gradient."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, order_R: Tensor, moves: Moves) -> Tensor:
        ctx.moves, ctx.order_R = moves, order_R
        y_MD = moves.exchange.back(_unsorted(y_RD, order_R)) if moves.travel else y_RD
        return _added(y_MD, moves.place_Tk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        moves: Moves = ctx.moves
        dy_MD = grads[0][moves.token_M]
        return moves.exchange.deliver(dy_MD)[ctx.order_R] if moves.travel else dy_MD, None, None


def _unsorted(rows: Tensor, order_R: Tensor) -> Tensor:
    return torch.empty_like(rows).index_copy_(0, order_R, rows)


def _added(y_MD: Tensor, place_Tk: Tensor) -> Tensor:
    """`[T, D]`: the sum of the rows at `place_Tk`, one after the other in FP32 (of FP32 rows in FP64), rounded once."""
    dtype = torch.float64 if y_MD.dtype == torch.float32 else torch.float32
    total = y_MD.new_zeros((len(place_Tk), y_MD.shape[1]), dtype=dtype)
    if len(y_MD):
        for place_T in place_Tk.unbind(1):
            total += y_MD[place_T.clamp(min=0)].masked_fill_((place_T < 0)[:, None], 0.0)
    return total.to(y_MD.dtype)


def dispatch(x_TD: Tensor, routes: Routes, address_T: Tensor, config: MoeConfig, context: LayerContext) -> Arrivals:
    """Send each row to its experts. address_T: int64, of the tokens, which follow each other in a microbatch.

    Reads the numbers of rows back, once. Collective over ep.
    """
    ep, (T, k) = context.ep, routes.experts_Tk.shape
    chunks = -(-T * context.tp_cp.size // config.segment_tokens) if config.segment_tokens else 1
    with torch.no_grad():
        expert_C = routes.experts_Tk.flatten()
        if routes.kept_Tk is not None:
            expert_C = expert_C.masked_fill(~routes.kept_Tk.flatten(), config.num_experts)
        address_C = address_T.repeat_interleave(k)
        key_C = (expert_C << PLACE_BITS) + address_C
        order_C = key_C.argsort()
        chunk_C = place_of(address_C) // (config.segment_tokens or 1) % chunks
        counts = torch.zeros((config.num_experts + 1) * chunks, dtype=torch.int64, device=x_TD.device)
        counts.scatter_add_(0, expert_C * chunks + chunk_C, torch.ones_like(expert_C))
        exchange = RowExchange.agree(counts[:-chunks].view(ep.size, -1), ep, T * k)
        choice_M = order_C[: exchange.num_sent]
        place_Tk = torch.full_like(expert_C, -1)
        place_Tk[choice_M] = torch.arange(len(choice_M), device=x_TD.device)
        moves = Moves(exchange, choice_M, place_Tk.view(T, k), key_C[choice_M])
    arrived = _ToExperts.apply(x_TD, routes.weights_Tk, moves)
    segments = segments_of(exchange, config.num_experts // ep.size, context.tp_cp)
    addresses = arrived[2] & ~((1 << ROUND_BITS) - (1 << PLACE_BITS))
    return Arrivals(arrived[0], arrived[1], addresses, segments, arrived[3], moves)


def combine(y_RD: Tensor, arrivals: Arrivals) -> Tensor:
    """The results of each token's experts, added: `[T, D]`. Collective over ep."""
    y_TD: Tensor = _FromExperts.apply(y_RD, arrivals.order_R, arrivals.moves)
    return y_TD


def segments_of(exchange: RowExchange, num_experts: int, tp_cp: Group) -> Segments:
    """What came from the ranks of one microbatch to an expert is a segment, or several, by chunks of addresses.

    num_experts: of this rank; the classes of the exchange are the chunks of each, in the order of the experts.
    """
    ranks = exchange.group.ranks
    sources = [(rank - ranks[0] + ranks[0] % tp_cp.size) // tp_cp.size for rank in ranks]
    received = torch.tensor(exchange.received_of, dtype=torch.int64).view(len(ranks), num_experts, -1)
    merged = received.new_zeros(sources[-1] + 1, *received.shape[1:]).index_add_(0, torch.tensor(sources), received)
    return Segments.of_counts(merged.transpose(0, 1).flatten(1).tolist())
