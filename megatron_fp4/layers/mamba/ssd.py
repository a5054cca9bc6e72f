"""The state-space recurrence of Mamba-2 (arXiv 2405.21060), as a chunked scan and step by step.

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T          y_t = h_t C_t

Inside a chunk the recurrence is a masked matrix product, as in attention; between chunks only the state travels.
`ssd_scan` does that; `ssd_recurrence` is the definition, slow, and what the scan is tested against.

Shape letters beyond those of layer_context.py:
    H heads, P head dim, G groups of heads that share B and C, R = H / G heads of a group, N state,
    K chunks of the sequence, Q tokens of a chunk, J the tokens of the same chunk that a token Q looks back at.
Everything is computed in FP32 (FP64 for FP64 inputs): the decays are differences of long sums, and the state is a sum
over the whole sequence.

Not here: projections, convolution, softplus of dt, the skip D x and the gate (mixer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, einsum

Carry = Callable[[Tensor, Tensor], Tensor]
"""(state_BHPN after the sequence had it begun with zero, survives_BH) -> the state_BHPN that it really begins with.
survives_BH: the part of an earlier state that is left at the end of the sequence."""


def document_starts(documents_BS: Tensor, previous_B: Tensor | None = None) -> Tensor:
    """bool `[B, S]`: the token is of another document than the one before it.

    previous_B: document of the token before the first one; without it the first token starts nothing.
    """
    before_B1 = documents_BS[:, :1] if previous_B is None else previous_B[:, None]
    return documents_BS != torch.cat([before_B1, documents_BS[:, :-1]], dim=1)


class ScanMasks(NamedTuple):
    """What the chunked scan leaves out; bool, for every group and head.

    hidden: `[Q, Q]` or `[B, K, 1, 1, Q, J]`: J is after Q, or in another document. after_start, before_end:
    `[B, K, 1, 1, Q]`: a document has begun in the chunk until Q; one begins between Q and the end of the chunk.
    """

    hidden: Tensor
    after_start: Tensor | None
    before_end: Tensor | None


def scan_masks(starts_BS: Tensor | None, chunk: int, device: torch.device) -> ScanMasks:
    """The masks of chunks of `chunk` tokens. starts_BS: bool, True where the state is set to zero before the token."""
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=device).triu_(1)
    if starts_BS is None:
        return ScanMasks(later, None, None)
    # The number of documents that have begun in the chunk: [B, K, 1, 1, Q].
    runs = _chunked(starts_BS.to(torch.int64), chunk).cumsum(-1)[:, :, None, None]
    elsewhere = runs[..., :, None] != runs[..., None, :]
    return ScanMasks(elsewhere.logical_or_(later), runs > 0, runs[..., -1:] != runs)


def ssd_recurrence(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    *,
    starts_BS: Tensor | None = None,
    initial_BHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token after the other: the outputs y_BSHP and the state_BHPN after the last token. See `ssd_scan`."""
    heads_per_group = x_BSHP.shape[2] // B_BSGN.shape[2]
    B_BSHN, C_BSHN = (part.repeat_interleave(heads_per_group, dim=2) for part in (B_BSGN, C_BSGN))
    state = x_BSHP.new_zeros(x_BSHP.shape[0], *x_BSHP.shape[2:], B_BSGN.shape[3])
    if initial_BHPN is not None:
        state = initial_BHPN
    outputs = []
    for t in range(x_BSHP.shape[1]):
        if starts_BS is not None:
            state = state.masked_fill(starts_BS[:, t, None, None, None], 0.0)
        decay_BH, input_BHP = (dt_BSH[:, t] * A_H).exp(), dt_BSH[:, t, :, None] * x_BSHP[:, t]
        state = decay_BH[..., None, None] * state + input_BHP[..., None] * B_BSHN[:, t, :, None]
        outputs.append((state * C_BSHN[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


def ssd_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    *,
    chunk: int,
    masks: ScanMasks | None = None,
    initial: Tensor | Carry | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked scan: y_BSHP and the state_BHPN after the last token, both FP32 (FP64 for FP64 inputs).

    dt_BSH: positive step sizes. A_H: negative. Head h reads group `h // (H / G)` of B and C. chunk: tokens per chunk;
    the sequence may have any length. masks: `scan_masks` of chunks as long; None: the state is never set to zero.
    initial: state_BHPN before the first token (zero if None), or a function that finds it from what this sequence does
    to a state, for a sequence whose beginning is on another rank.
    """
    work = torch.promote_types(x_BSHP.dtype, torch.float32)
    x, dt, A, B, C = (part.to(work) for part in (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN))
    S = x.shape[1]
    H = x.shape[2]
    G = B.shape[2]
    heads = (G, H // G)
    # A padded token has dt = 0: it neither decays nor writes.
    log_decay_BKQGR = _chunked(dt * A, chunk).unflatten(3, heads)
    u_BKGRQP = einsum("BKQGRP->BKGRQP", _chunked(dt[..., None] * x, chunk).unflatten(3, heads))
    B_BKQGN, C_BKQGN = _chunked(B, chunk), _chunked(C, chunk)
    cumulative_BKGRQ = einsum("BKQGR->BKGRQ", log_decay_BKQGR).cumsum(-1)
    hidden, after_start, before_end = masks or scan_masks(None, chunk, x.device)

    inside_BKGRQP = _within_chunks(u_BKGRQP, B_BKQGN, C_BKQGN, cumulative_BKGRQ, hidden)
    # What each chunk adds to the state at its end, and what it leaves of the state before it.
    to_end_BKGRQ = cumulative_BKGRQ[..., -1:] - cumulative_BKGRQ
    from_start_BKGRQ = cumulative_BKGRQ
    if after_start is not None and before_end is not None:
        to_end_BKGRQ = to_end_BKGRQ.masked_fill(before_end, -torch.inf)
        from_start_BKGRQ = from_start_BKGRQ.masked_fill(after_start, -torch.inf)
    added_BKGRPN = einsum("BKGRQP,BKQGN->BKGRPN", u_BKGRQP * to_end_BKGRQ.exp()[..., None], B_BKQGN)
    survives_BKGRQ = from_start_BKGRQ.exp()
    before_BKHPN, final_BHPN = _between_chunks(
        added_BKGRPN.flatten(2, 3), survives_BKGRQ[..., -1].flatten(2, 3), initial
    )
    carried_BKGRQP = einsum("BKQGN,BKGRPN->BKGRQP", C_BKQGN, before_BKHPN.unflatten(2, heads))
    y_BKGRQP = inside_BKGRQP + carried_BKGRQP * survives_BKGRQ[..., None]
    y_BKQHP = einsum("BKGRQP->BKQGRP", y_BKGRQP).flatten(3, 4)
    return y_BKQHP.flatten(1, 2)[:, :S], final_BHPN


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """`[B, S, ...] -> [B, K, chunk, ...]`, padded with zeros at the end."""
    padding = -x.shape[1] % chunk
    if padding:
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, padding])
    return x.unflatten(1, (-1, chunk))


def _within_chunks(
    u_BKGRQP: Tensor, B_BKQGN: Tensor, C_BKQGN: Tensor, cumulative_BKGRQ: Tensor, hidden: Tensor
) -> Tensor:
    """Outputs from the tokens of the same chunk: `[B, K, G, R, Q, P]`.

    y_q = sum over j <= q of (C_q . B_j) exp(cumulative_q - cumulative_j) u_j, for q and j between the same two starts.
    """
    # Masked before the exponential: above the diagonal it would overflow, and infinity times zero has no gradient.
    # In place, because this is the largest tensor of the layer.
    decay_BKGRQJ = cumulative_BKGRQ[..., :, None] - cumulative_BKGRQ[..., None, :]
    decay_BKGRQJ = decay_BKGRQJ.masked_fill_(hidden, -torch.inf).exp_()
    scores_BKGQJ = einsum("BKQGN,BKJGN->BKGQJ", C_BKQGN, B_BKQGN)  # shared by the heads of a group
    return einsum("BKGRQJ,BKGRJP->BKGRQP", scores_BKGQJ[:, :, :, None] * decay_BKGRQJ, u_BKGRQP)


def _between_chunks(added_BKHPN: Tensor, survives_BKH: Tensor, initial: Tensor | Carry | None) -> tuple[Tensor, Tensor]:
    """States before each chunk, `[B, K, H, P, N]`, and after the last, `[B, H, P, N]`.

    added: what each chunk writes. survives: the part of an earlier state that it keeps.
    """
    state_BHPN, factor_BH = torch.zeros_like(added_BKHPN[:, 0]), torch.ones_like(survives_BKH[:, 0])
    states, factors = [], []
    for added_BHPN, keeps_BH in zip(added_BKHPN.unbind(1), survives_BKH.unbind(1), strict=True):
        states.append(state_BHPN)
        factors.append(factor_BH)
        state_BHPN = state_BHPN * keeps_BH[..., None, None] + added_BHPN
        factor_BH = factor_BH * keeps_BH
    before_BKHPN = torch.stack(states, dim=1)
    if initial is None:
        return before_BKHPN, state_BHPN
    initial_BHPN = initial if isinstance(initial, Tensor) else initial(state_BHPN, factor_BH)
    initial_BHPN = initial_BHPN.to(added_BKHPN.dtype)
    factor_BKH = torch.stack(factors, dim=1)
    return (
        before_BKHPN + factor_BKH[..., None, None] * initial_BHPN[:, None],
        state_BHPN + factor_BH[..., None, None] * initial_BHPN,
    )
