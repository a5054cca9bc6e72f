"""When a weight gradient is computed, and where it waits until then. It is the same number at any time."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum


class WgradPlan(Enum):
    """When the backward pass of a linear computes its weight gradient. `quantized_linear` takes a queue, or None."""

    now = "now"  # right after dx: no queue
    while_scattering = "while_scattering"  # while dx travels between tensor-parallel ranks: a queue of this one call
    deferred = "deferred"  # when the pipeline schedule has time for it (zero bubble): the queue of the stage

    @staticmethod
    def choose(*, defer: bool, overlap: bool) -> WgradPlan:
        """Deferred if the pipeline schedule has a use for it, else beside the sends of tensor parallelism."""
        if defer:
            return WgradPlan.deferred
        return WgradPlan.while_scattering if overlap else WgradPlan.now


class WgradQueue:
    """Weight gradients that are computed later."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def put(self, compute: Callable[[], None]) -> None:
        self._waiting.append(compute)

    def take(self) -> Callable[[], None]:
        """Remove everything that waits; the result computes it, in the order it was put."""
        waiting, self._waiting = self._waiting, []

        def compute_all() -> None:
            while waiting:
                waiting.pop(0)()  # released one by one: each holds the operands of a GEMM

        return compute_all

    def drain(self) -> None:
        """Compute everything that waits now."""
        self.take()()
