"""The quantized copies of a weight, kept from one microbatch to the next.

A copy is valid as long as everything that went into it is what it was. Its key is therefore made of the very arguments
from which it would be quantized again: nobody has to tell the cache that something has changed. Seed and step are in
the key of those copies that vary by step (stochastic rounding, signs per step), because the weights' version alone does
not tell two steps apart: an evaluation comes after the update of one step and before the noise of the next.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.sharding import Sharding


class WeightVersion(NamedTuple):
    """What changes when the values of a weight do.

    update: the `StepClock`'s count; the update of a sharded optimizer arrives through views, which no tensor counts.
    edit: torch's count of changes in place (another optimizer, an initialisation). storage: another one after
    `weight.data = ...`; a weak reference, because the address of a storage that is gone may be given to the next.
    """

    update: int
    edit: int
    storage: StorageWeakRef

    @staticmethod
    def of(weight: Tensor, clock: StepClock) -> WeightVersion:
        return WeightVersion(clock.weights_version, weight._version, StorageWeakRef(weight.untyped_storage()))

    def check(self, name: str, now: WeightVersion) -> None:
        """Raises RuntimeError where a backward pass would use other weights than its forward pass, of this version."""
        if now != self:
            raise RuntimeError(
                f"{name}: the weights changed ({self} -> {now}) between a forward pass and its backward pass; Dgrad"
                f" would use other weights than Fprop"
            )


class WeightCache:
    """The last copies of one weight."""

    def __init__(self) -> None:
        self._operands: dict[Hashable, QuantizedOperand] = {}

    def clear(self) -> None:
        """Forget the copies."""
        self._operands = {}

    def get(
        self,
        weight: Tensor,
        copies: Sequence[Copy],
        *,
        backend: Backend,
        sharding: Sharding,
        version: WeightVersion,
        seed: int,
        step: int,
    ) -> tuple[QuantizedOperand, ...]:
        """`backend.quantize` of the weight `[N, K]`, or what it gave the last time."""
        common = (version, weight.device, weight.dtype, backend, sharding)
        keys = [(copy, *common, (seed, step) if copy.operand.random else None) for copy in copies]
        if any(key not in self._operands for key in keys):
            self.clear()  # the old ones go first
            operands = self._quantize(weight.detach(), copies, backend, sharding.w(seed, step))
            self._operands = dict(zip(keys, operands, strict=True))
        return tuple(self._operands[key] for key in keys)

    def _quantize(
        self, weight: Tensor, copies: Sequence[Copy], backend: Backend, origin: OperandOrigin
    ) -> tuple[QuantizedOperand, ...]:
        return backend.quantize(weight, origin, copies)
