"""Mamba-2 over a sequence that is sharded over the context-parallel ranks.

The recurrence is linear in the state, so every rank scans its two zig-zag chunks from a zero state, the small final
states (H * P * N numbers a sequence, whatever its length) are gathered, and the state that enters each chunk is worked
out from them. The convolution needs only the last few tokens of the chunk before. Each token is scanned once, on the
rank that holds it, and no head or group count has to divide by cp.

A rank's sequence is treated as `pieces` separate ones: `[B, S, ...]` is viewed as `[B * pieces, S / pieces, ...]`, two
pieces under context parallelism and one without. The order of chunks is that of layers/context_parallel.py:

    cp = 2:   rank 0 holds chunks 0 3,   rank 1 holds chunks 1 2
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.comm.autograd import gather_rows
from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.context_parallel import in_sequence_order


def in_pieces(x_BS: Tensor, cp: Group) -> Tensor:
    """`[B, S, ...] -> [B * pieces, S / pieces, ...]`."""
    return x_BS.unflatten(1, (1 if cp.size == 1 else 2, -1)).flatten(0, 1)


def previous_tokens(pieces: Tensor, count: int, cp: Group) -> Tensor:
    """The `count` tokens before each piece, `[B * pieces, count, ...]`; zeros before the start of the sequence.

    pieces: `[B * pieces, S / pieces, ...]`. Raises ValueError if a piece is shorter than `count`.
    """
    if cp.size == 1:
        return pieces.new_zeros(pieces.shape[0], count, *pieces.shape[2:])
    if pieces.shape[1] < count:
        raise ValueError(
            f"a chunk of {pieces.shape[1]} tokens (sequence / (2 * cp), cp = {cp.size}) is shorter than the {count}"
            " tokens that the convolution of a Mamba-2 layer looks back; use a longer sequence or a smaller cp"
        )
    tails = _gather_pieces(pieces[:, -count:], cp)
    before = torch.cat([torch.zeros_like(tails[:1]), tails[:-1]])
    return _local_pieces(before, cp)


def carry_states(state_BHPN: Tensor, survives_BH: Tensor, cp: Group) -> Tensor:
    """The state before each piece, `[B * 2, H, P, N]`; the `Carry` of `ssd_scan`.

    state_BHPN: after the piece, had it begun with zero. survives_BH: part of an earlier state that outlives the piece.
    """
    packed = torch.cat([state_BHPN.flatten(2), survives_BH[..., None]], dim=-1)
    chunks = _gather_pieces(packed, cp)  # [2 * cp, B, H, P * N + 1]
    state = torch.zeros_like(chunks[0, ..., :-1])
    states = []
    for chunk in chunks:
        states.append(state)
        state = state * chunk[..., -1:] + chunk[..., :-1]
    return _local_pieces(torch.stack(states), cp).unflatten(-1, state_BHPN.shape[2:])


def _gather_pieces(pieces: Tensor, cp: Group) -> Tensor:
    """`[B * 2, ...]` of every rank -> `[2 * cp, B, ...]` in sequence order, with its gradient."""
    gathered = gather_rows(pieces.unflatten(0, (-1, 2)).transpose(0, 1).contiguous(), cp)
    return in_sequence_order(gathered.unflatten(0, (cp.size, 2)), cp)


def _local_pieces(chunks: Tensor, cp: Group) -> Tensor:
    """`[2 * cp, B, ...] -> [B * 2, ...]`: this rank's two chunks, as pieces."""
    return torch.stack([chunks[cp.rank], chunks[-1 - cp.rank]], dim=1).flatten(0, 1)
