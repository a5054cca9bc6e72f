"""How much of the head's gradient comes from each loss: the next token's, and that of each depth of later tokens.

The head is used once per loss, and its weight gradient is the sum. A part that is small beside the others is the first
to be lost where that sum is made in few bits, as in Nemotron 3 Ultra's first divergence. What is compared is the norm
of the gradient with respect to the logits, weights of the losses included: squares in FP64, summed over microbatches
and ranks, so no layout changes the shares. Nothing is computed on steps that are not measured.

Not here: when a step is measured, and where the numbers go (train/telemetry/monitors/residuals.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import Group


class LossShareProbe:
    """What the losses send back into the head of one stage. recording: whether passes of now are watched."""

    def __init__(self) -> None:
        self.recording = False
        self.squares: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Record from now on, and forget what was."""
        self.recording = True
        self.squares = {}

    def watch(self, logits: Sequence[Tensor]) -> None:
        """logits `[T, V/tp]`: of the next token, then of each depth."""
        for number, logits_TV in enumerate(logits):
            if logits_TV.requires_grad:
                logits_TV.register_hook(lambda grad, number=number: self._add(number, grad))

    def _add(self, number: int, grad_TV: Tensor) -> None:
        square = torch.linalg.vector_norm(grad_TV, dtype=torch.float64).square()
        self.squares[number] = self.squares[number] + square if number in self.squares else square


def loss_shares(probes: Iterable[LossShareProbe], num_losses: int, world: Group, device: torch.device) -> list[float]:
    """The part of each loss in the sum of their norms, the same on all ranks. Collective; reads back once."""
    local = torch.zeros(num_losses, dtype=torch.float64, device=device)
    for probe in probes:
        for number, square in probe.squares.items():
            local[number] += square
    norms = all_reduce_sum(local, world).sqrt()
    shares: list[float] = (norms / norms.sum().clamp(min=torch.finfo(torch.float64).tiny)).float().tolist()
    return shares
