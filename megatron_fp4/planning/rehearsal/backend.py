"""The run's own backend, where it is made of torch's operations; else one whose operands are as large. Counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_fp4.planning.rehearsal.kernels import KernelCounts
from megatron_fp4.planning.stand_ins import DEQUANTIZING, SizedBackend
from megatron_fp4.precision.backends import Backend, Copy, OperandOrigin, QuantizedOperand, choose
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.probes import Probes
from megatron_fp4.precision.statistics_probe import StatisticsProbe
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.telemetry.probes import probed_backend

AroundWeight = Callable[[], AbstractContextManager[None]]


def counted_backend(config: RunConfig, counts: KernelCounts, around_weight: AroundWeight) -> tuple[Backend, Probes]:
    """The backend that a run of `config` has, with its probes. around_weight: see `CountedBackend`."""
    if config.precision.backend in DEQUANTIZING:
        with patch.object(choose, "compile_obstacle", lambda: ""):  # of this machine's CPU
            inner, probes = probed_backend(config)
    else:
        inner, probes = SizedBackend(config.precision.backend, on_gpu=True), Probes()
        if config.train.statistics_interval_steps:
            inner = probes.statistics = StatisticsProbe(inner)
    return CountedBackend(inner, counts, around_weight), probes


def modelled(config: RunConfig) -> Iterator[str]:
    """What stands in for that of a GPU."""
    yield "attention and RMSNorm keep what CUDA's kernels keep"
    if "E" in config.model.blocks:
        yield "every expert is sent as many rows"
    backend = config.precision.backend
    if backend not in DEQUANTIZING:
        yield f"operands have the sizes of {backend.name}'s; its own kernels and scratch memory are not counted"
    elif config.precision.compile and backend is BackendName.emulated:
        yield "a stage that torch compiles is one launch that makes its results"


class CountedBackend:
    """See `Backend`: another one, whose kernels are counted by what they are for.

    around_weight: entered while a weight is quantized, whose copies are kept.
    """

    def __init__(self, inner: Backend, counts: KernelCounts, around_weight: AroundWeight) -> None:
        self._inner, self._counts = inner, counts
        self._around_weight = around_weight

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        """See `Backend.quantize`."""
        if not any(copy.operand.quantized for copy in copies):
            return self._inner.quantize(x, origin, copies)
        with self._counts.computing(f"quantize {origin.operand}"):
            if origin.operand != "w":
                return self._inner.quantize(x, origin, copies)
            with self._around_weight():
                return self._inner.quantize(x, origin, copies)

    def matmul(
        self, a: QuantizedOperand, b: QuantizedOperand, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        with self._counts.computing("multiply"):
            return self._inner.matmul(a, b, out_dtype=out_dtype, accumulate_into=accumulate_into)
