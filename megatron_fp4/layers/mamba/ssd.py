"""The state-space recurrence of Mamba-2 (arXiv 2405.21060), as a chunked scan and step by step.

    h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T          y_t = h_t C_t

One idea: inside a chunk the recurrence is a masked matrix product, as in attention; between chunks only the state
travels. `ssd_scan` does that; `ssd_recurrence` is the definition, slow, and what the scan is tested against.

Not here: projections, convolution, softplus of dt, the skip D x and the gate (see mamba2.py).

Shape letters beyond those of layer_context.py:
    H heads, P head dim, G groups of heads that share B and C, R = H / G heads of a group, N state,
    Q tokens of a chunk, K chunks of the sequence.
Everything is computed in FP32 (FP64 for FP64 inputs): the decays are differences of long sums, and the state is a sum
over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Carry = Callable[[Tensor, Tensor], Tensor]
"""(state_BHPN after the sequence had it begun with zero, survives_BH) -> the state_BHPN that it really begins with.
survives_BH: the part of an earlier state that is left at the end of the sequence."""


def document_starts(documents_BS: Tensor, previous_B: Tensor | None = None) -> Tensor:
    """bool `[B, S]`: the token is of another document than the one before it.

    previous_B: document of the token before the first one; without it the first token starts nothing.
    """
    before_B1 = documents_BS[:, :1] if previous_B is None else previous_B[:, None]
    return documents_BS != torch.cat([before_B1, documents_BS[:, :-1]], dim=1)


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
    starts_BS: Tensor | None = None,
    initial: Tensor | Carry | None = None,
) -> tuple[Tensor, Tensor]:
    """The chunked scan: y_BSHP and the state_BHPN after the last token, both FP32 (FP64 for FP64 inputs).

    dt_BSH: positive step sizes. A_H: negative. Head h reads group `h // (H / G)` of B and C. chunk: tokens per chunk;
    the sequence may have any length. starts_BS: bool, True where the state is set to zero before the token.
    initial: state_BHPN before the first token (zero if None), or a function that finds it from what this sequence does
    to a state, for a sequence whose beginning is on another rank.
    """
    work = torch.promote_types(x_BSHP.dtype, torch.float32)
    x, dt, A, B, C = (part.to(work) for part in (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN))
    S, H, G = x.shape[1], x.shape[2], B.shape[2]
    log_decay = _chunked(dt * A, chunk)  # [B, K, Q, H]; a padded token has dt = 0: it neither decays nor writes
    u = _chunked(dt[..., None] * x, chunk).movedim(2, 3).unflatten(2, (G, H // G))  # [B, K, G, R, Q, P]
    B, C = (_chunked(part, chunk).movedim(2, 3) for part in (B, C))  # [B, K, G, Q, N]
    cumulative = log_decay.movedim(2, 3).cumsum(-1).unflatten(2, (G, H // G))  # [B, K, G, R, Q]
    runs = None if starts_BS is None else _chunked(starts_BS.to(torch.int64), chunk).cumsum(-1)[:, :, None, None]

    y = _within_chunks(u, B, C, cumulative, runs)
    # What each chunk adds to the state at its end, and what it leaves of the state before it. B and C are common to a
    # group, so R * P is one dimension of the products.
    to_end = cumulative[..., -1:] - cumulative
    from_start = cumulative
    if runs is not None:
        to_end = to_end.masked_fill(runs[..., -1:] != runs, -torch.inf)
        from_start = from_start.masked_fill(runs > 0, -torch.inf)
    added = (u * to_end.exp()[..., None]).mT.flatten(3, 4) @ B  # [B, K, G, R * P, N]
    survives = from_start.exp()
    by_head = added.unflatten(3, (H // G, -1)).flatten(2, 3)
    incoming, final = _between_chunks(by_head, survives[..., -1].flatten(2, 3), initial)
    carried = C @ incoming.unflatten(2, (G, H // G)).flatten(3, 4).mT  # [B, K, G, Q, R * P]
    y = y + carried.unflatten(-1, (H // G, -1)).movedim(-2, 3) * survives[..., None]
    return y.flatten(2, 3).movedim(3, 2).flatten(1, 2)[:, :S], final


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """`[B, S, ...] -> [B, K, chunk, ...]`, padded with zeros at the end."""
    padding = -x.shape[1] % chunk
    if padding:
        x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, padding])
    return x.unflatten(1, (-1, chunk))


def _within_chunks(u: Tensor, B: Tensor, C: Tensor, cumulative: Tensor, runs: Tensor | None) -> Tensor:
    """Outputs from the tokens of the same chunk: `[B, K, G, R, Q, P]`.

    y_i = sum over j <= i of (C_i . B_j) exp(cumulative_i - cumulative_j) u_j, for i and j between the same two starts.
    """
    Q = u.shape[-2]
    allowed = torch.ones(Q, Q, dtype=torch.bool, device=u.device).tril()
    if runs is not None:
        allowed = allowed & (runs[..., :, None] == runs[..., None, :])
    # Masked before the exponential: above the diagonal it would overflow, and infinity times zero has no gradient.
    exponent = (cumulative[..., :, None] - cumulative[..., None, :]).masked_fill(~allowed, -torch.inf)
    scores = (C @ B.mT)[:, :, :, None]  # shared by the heads of a group
    return (scores * exponent.exp()) @ u


def _between_chunks(added: Tensor, survives: Tensor, initial: Tensor | Carry | None) -> tuple[Tensor, Tensor]:
    """States before each chunk, `[B, K, H, P, N]`, and after the last, `[B, H, P, N]`.

    added: `[B, K, H, P, N]` what each chunk writes. survives: `[B, K, H]` the part of an earlier state that it keeps.
    """
    state, factor = torch.zeros_like(added[:, 0]), torch.ones_like(survives[:, 0])
    states, factors = [], []
    for number in range(added.shape[1]):
        states.append(state)
        factors.append(factor)
        keeps = survives[:, number]
        state, factor = state * keeps[..., None, None] + added[:, number], factor * keeps
    incoming = torch.stack(states, dim=1)
    if initial is None:
        return incoming, state
    before = initial if isinstance(initial, Tensor) else initial(state, factor)
    before = before.to(added.dtype)
    incoming = incoming + torch.stack(factors, dim=1)[..., None, None] * before[:, None]
    return incoming, state + factor[..., None, None] * before
