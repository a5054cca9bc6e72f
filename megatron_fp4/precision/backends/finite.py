"""NaN and Inf on their way to a quantizer, in which they would become ordinary codes: raised, or recorded.

What a backend measures of a tensor, its largest magnitude, is also what shows them: NaN propagates through a maximum of
torch's. It does not through NCCL's, so a rank looks at what it measured itself too, and may be the only one to see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_reduce_max
from megatron_fp4.numerics.stages import power_of_two_amax
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin
from megatron_fp4.precision.operand import AmaxRounding, AmaxScope, Format


class NonFiniteError(FloatingPointError):
    """A tensor with NaN or Inf reached a quantizer. `name`: the linear; `operand`: "x", "w" or "dy"."""

    def __init__(self, origin: OperandOrigin, amax: float) -> None:
        super().__init__(
            f"{origin.label}: operand {origin.operand} contains NaN or Inf (max |{origin.operand}| = {amax}) at step "
            f"{origin.step} on rank {origin.rank}; it cannot be quantized"
        )
        self.name = origin.name
        self.operand = origin.operand


@dataclass(frozen=True)
class NonFiniteEvent:
    """A NaN or Inf in an operand of the linear `name`, or of one of its experts. rank: one that held the tensor."""

    name: str
    operand: str
    step: int
    rank: int

    def __str__(self) -> str:
        return f"{self.name} ({self.operand}, rank {self.rank})"


class NonFiniteWatch:
    """Records NaN and Inf instead of raising, for a trainer whose ranks agree on a step before one of them stops.

    Nothing is read back from the device until `take`, which only a step that turned out to be bad needs.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[OperandOrigin, Tensor]] = []
        self._seen_segments: list[tuple[Sequence[OperandOrigin], Tensor]] = []

    def see(self, origin: OperandOrigin, largest: Sequence[Tensor]) -> None:
        """largest: max |x| of some copies, scalars; NaN or Inf if any element is."""
        self._seen += [(origin, amax) for amax in largest]

    def see_segments(self, origins: Sequence[OperandOrigin], largest: Tensor) -> None:
        """largest: max |x| of each segment, FP32 `[S]`."""
        self._seen_segments.append((origins, largest))

    def forget(self) -> None:
        """Begin a step: what was seen before is nobody's business any more."""
        self._seen, self._seen_segments = [], []

    def spoil(self, x: Tensor) -> Tensor:
        """The FP64 tensor `x` if everything seen since `forget` is finite, else NaN; without reading it."""
        if not self._seen and not self._seen_segments:
            return x
        return x.masked_fill(~torch.isfinite(self._largest()).all(), float("nan"))

    def _largest(self) -> Tensor:
        scalars = [torch.stack([largest for _, largest in self._seen])] if self._seen else []
        return torch.cat([*scalars, *(largest for _, largest in self._seen_segments)])

    def take(self) -> list[NonFiniteEvent]:
        """Every event since `forget`, in order, one per linear and operand."""
        seen = [origin for origin, _ in self._seen]
        seen += [origin for origins, _ in self._seen_segments for origin in origins]
        finite = torch.isfinite(self._largest()).tolist() if seen else []
        self.forget()
        events = [
            NonFiniteEvent(origin.label, origin.operand, origin.step, origin.rank)
            for origin, good in zip(seen, finite, strict=True)
            if not good
        ]
        return list(dict.fromkeys(events))


def check_finite(largest: Sequence[Tensor], origin: OperandOrigin, watch: NonFiniteWatch | None) -> None:
    """largest: max |x| of some copies, scalars. NaN and Inf go to `watch`, or raise NonFiniteError (by a read-back)."""
    if watch is not None:
        watch.see(origin, largest)
    elif not (value := torch.stack(list(largest)).amax().item()) < float("inf"):
        raise NonFiniteError(origin, value)


def check_finite_segments(
    amaxes: Sequence[Tensor], origins: Sequence[OperandOrigin], watch: NonFiniteWatch | None
) -> None:
    """See `check_finite`. amaxes: FP32 `[S]`, of some copies of a tensor of S segments."""
    if watch is not None:
        for largest in amaxes:
            watch.see_segments(origins, largest)
    elif amaxes:
        values = torch.stack(list(amaxes)).amax(0).tolist()
        for origin, value in zip(origins, values, strict=True):
            if not value < float("inf"):
                raise NonFiniteError(origin, value)


def reduce_amaxes(local: Sequence[Tensor], origin: OperandOrigin, copies: Sequence[Copy]) -> list[Tensor]:
    """The amax of each copy over its scope, rounded if it shall be, with one collective for all of them.

    local: FP32 amaxes of this rank, scalars (or one per row for amax_scope=row, which is never reduced). Only nvfp4
    has a global scale, so without it there is no collective.
    """
    result = list(local)
    scopes = [copy.operand.amax_scope if copy.operand.format is Format.nvfp4 else None for copy in copies]
    known = origin.amax
    for i, scope in enumerate(scopes):
        if scope is AmaxScope.static and known is not None:
            result[i] = known
    whole = (AmaxScope.tensor,) if known is not None else (AmaxScope.tensor, AmaxScope.static)
    shared = [i for i, scope in enumerate(scopes) if scope in whole]
    if shared and origin.group.size > 1:
        reduced = all_reduce_max(torch.stack([local[i] for i in shared]), origin.group).unbind()
        for i, amax in zip(shared, reduced, strict=True):
            result[i] = amax
    for i, copy in enumerate(copies):
        if copy.operand.amax_rounding is AmaxRounding.power_of_two:
            result[i] = power_of_two_amax(result[i], 6.0 * copy.operand.scale_bound)
    return result


def reduce_and_check(
    local: Sequence[Tensor], origin: OperandOrigin, copies: Sequence[Copy], watch: NonFiniteWatch | None
) -> list[Tensor]:
    """See `reduce_amaxes`. NaN and Inf go to `watch`, or raise once no rank waits for a message of this one."""
    result = reduce_amaxes(local, origin, copies)
    if local:
        seen = {id(amax): amax for amax in (*local, *result)}.values()  # each once: one launch per tensor on a GPU
        check_finite([amax if amax.dim() == 0 else amax.amax() for amax in seen], origin, watch)
    return result
