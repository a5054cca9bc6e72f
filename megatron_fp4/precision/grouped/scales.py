"""Scopes of an amax that a linear cannot have: `expert_call` without experts, `static` with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_fp4.precision.operand import AmaxScope
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
        if info.num_experts and table[info.name].fprop.x.amax_scope is AmaxScope.static:
            raise ValueError(
                f"{label}{info.name} has amax_scope=static, but a scale for each segment of each of its experts; give"
                " experts a recipe without it, by a rule such as {match: '*.experts.*', use: ...}"
            )
        if not info.num_experts and any(gemm.joins_segments for gemm in table[info.name].gemms):
            raise ValueError(
                f"{label}{info.name} has amax_scope=expert_call, but no experts; give it another recipe, and this one"
                f" to experts alone, by a rule such as {{match: '*.experts.*', use: ...}}"
            )
