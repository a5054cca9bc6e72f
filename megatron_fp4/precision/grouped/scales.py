"""Where a scale over all that reaches an expert (`amax_scope=expert_call`) is refused: in linears without experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_fp4.precision.table import PrecisionTable


class MaybeExperts(Protocol):
    """A linear of the model (models.block.LinearInfo). num_experts: 0 where it has none."""

    @property
    def name(self) -> str: ...
    @property
    def num_experts(self) -> int: ...


def check_expert_scales(label: str, table: PrecisionTable, linears: Sequence[MaybeExperts]) -> None:
    """Raises ValueError with the remedy. label: what the error begins with."""
    for info in linears:
        if not info.num_experts and any(gemm.joins_segments for gemm in table[info.name].gemms):
            raise ValueError(
                f"{label}{info.name} has amax_scope=expert_call, but no experts; give it another recipe, and this one"
                f" to experts alone, by a rule such as {{match: '*.experts.*', use: ...}}"
            )
