"""What a step gains by its precision: its time against that of the same products in MXFP8, and in BF16.

Published ratios of whole runs can be held against it (docs/planning.md), which those of single products cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megatron_fp4.models.block import LinearInfo
from megatron_fp4.models.count import Flops
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.roofline import roofline_section
from megatron_fp4.planning.cost.time import step_time
from megatron_fp4.planning.idle import PipelineLayout
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision.operand import Format, Operand
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig


def step_gains(
    config: RunConfig, flops: Flops, pipeline: PipelineLayout, settings: RankSettings, idle: float, site: Site
) -> dict[str, float]:
    """`over_mxfp8` and `over_bf16`: how many times faster a step is expected to be. Arguments as `step_time`."""
    table = settings.table
    assert table is not None

    def seconds(one: PrecisionTable) -> float:
        return step_time(config, flops, pipeline, replace(settings, table=one), idle, site).expected

    planned = seconds(table)
    return {f"over_{kind.name}": seconds(in_format(table, kind)) / planned for kind in (Format.mxfp8, Format.bf16)}


def in_format(table: PrecisionTable, number_format: Format) -> PrecisionTable:
    """The same products in another format, without options."""
    if number_format is Format.bf16:
        return PrecisionTable(tuple(replace(row, precision=LinearPrecision()) for row in table.rows))

    def change(operand: Operand) -> Operand:
        return Operand(format=number_format) if operand.quantized else operand

    return PrecisionTable(tuple(replace(row, precision=row.precision.with_operands(change)) for row in table.rows))


def roofline_with_gains(
    config: RunConfig,
    linears: Sequence[LinearInfo],
    flops: Flops,
    pipeline: PipelineLayout,
    settings: RankSettings,
    idle: float,
    site: Site,
) -> dict[str, Any]:
    """The section `roofline` of a report."""
    return roofline_section(
        linears, config.model.moe, settings, site, partial(step_gains, config, flops, pipeline, settings, idle)
    )
