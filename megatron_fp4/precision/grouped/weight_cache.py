"""The quantized copies of the weights of experts, kept from one microbatch to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_fp4.precision.backends.padded import padded_index
from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.backends.randomness import expert_rows
from megatron_fp4.precision.grouped.protocol import quantize_segments
from megatron_fp4.precision.grouped.segments import RowSegment, Segments
from megatron_fp4.precision.weight_cache import WeightCache


class GroupedWeightCache(WeightCache):
    """The last copies of the weights of `num_experts` experts, `[E * N, K]`, each with scales of its own.

    first_expert: global number of the first. multiples: of N and K, to which weights are extended by zeros.
    """

    def __init__(self, num_experts: int, first_expert: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.first_expert = first_expert
        self.multiples = (1, 1)

    def _quantize(
        self, weight: Tensor, copies: Sequence[Copy], backend: Backend, origin: OperandOrigin
    ) -> tuple[QuantizedOperand, ...]:
        size = weight.shape[0] // self.num_experts
        experts = tuple(RowSegment(e, e * size, (e + 1) * size) for e in range(self.num_experts))
        rows, columns = self.multiples
        padding = Segments(experts, len(weight)).padded(rows, weight.device)
        numbers = torch.arange(self.num_experts, device=weight.device) + self.first_expert
        index = expert_rows(origin.rows.repeat(self.num_experts), numbers.repeat_interleave(size))
        place = replace(origin, rows=padding.addresses(index), cols=padded_index(origin.cols, columns))
        return quantize_segments(
            backend, padding.rows(weight, columns), place, padding.segments, self.first_expert, copies
        )
