"""How large the residual stream is behind each block: its root mean square over all tokens of a step.

Squares are summed in FP64 over microbatches and over all ranks, each of which has rows of its own, and the result is
rounded to FP32: no layout changes it. Nothing is computed on steps that are not measured.

Not here: when a step is measured, and where the numbers go (train/telemetry/monitors/residuals.py).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import Group


class ResidualProbe:
    """What leaves the blocks of one stage. recording: whether the forward passes of now are measured."""

    def __init__(self) -> None:
        self.recording = False
        self.squares: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def begin(self) -> None:
        """Record from now on, and forget what was."""
        self.recording = True
        self.squares, self.counts = {}, {}

    def add(self, index: int, x_TD: Tensor) -> None:
        """The activations behind block `index`, the rows of this rank."""
        square = torch.linalg.vector_norm(x_TD.detach(), dtype=torch.float64).square()
        self.squares[index] = self.squares[index] + square if index in self.squares else square
        self.counts[index] = self.counts.get(index, 0) + x_TD.numel()


def residual_rms(probes: Iterable[ResidualProbe], num_blocks: int, world: Group, device: torch.device) -> list[float]:
    """The root mean square behind each block of the model, the same on all ranks. Collective; reads back once."""
    local = torch.zeros(2, num_blocks, dtype=torch.float64, device=device)
    for probe in probes:
        for index, square in probe.squares.items():
            local[0, index] += square
            local[1, index] += probe.counts[index]
    total, count = all_reduce_sum(local, world).cpu()
    rms: list[float] = (total / count).sqrt().float().tolist()
    return rms
