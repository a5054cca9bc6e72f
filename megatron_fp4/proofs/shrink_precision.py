"""The precision of the small model of shrink.py: which blocks it must have, and what their linears become.

Everything here is a function of precision tables; sizes and batches are shrink.py's.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.operand import AmaxScope, Operand
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable


def first_table(config: PrecisionConfig, model: ModelConfig) -> PrecisionTable:
    """The precision of all linears of a model in the first phase of a run."""
    return PrecisionPlan(config, model_linears(model)).table()


def quantization_unit(table: PrecisionTable) -> int:
    """The least number, 16 or more, that every tile and transform of the table divides."""
    unit = 16
    for row in table.rows:
        for gemm in row.precision.gemms:
            for operand in gemm.operands:
                unit = math.lcm(unit, operand.contraction_multiple, operand.tile[0] if operand.tile else 1)
    return unit


def pick_blocks(model: ModelConfig, table: PrecisionTable, count: int) -> list[int]:
    """Blocks of the large model that the small one has, in order; a small large model repeats blocks."""
    kinds: dict[tuple[object, ...], int] = {}
    for index, letter in enumerate(model.blocks):
        precisions = tuple(row.precision for row in table.rows if row.name.startswith(f"blocks.{index}."))
        kinds.setdefault((letter, precisions), index)
    picked = list(kinds.values())
    total = len(model.blocks)
    evenly = [round((number + 0.5) * total / count - 0.5) for number in range(count)]
    missing = [index for index in evenly if index not in picked]
    picked += missing[: max(0, count - len(picked))]
    repeats = [index % total for index in range(max(0, count - len(picked)))]
    return sorted(picked + repeats)


def small_table(table: PrecisionTable, picked: list[int], model: ModelConfig) -> PrecisionTable:
    """The precision of a small `model` whose blocks stand for the blocks `picked` of the large one."""
    rows = {row.name: row for row in table.rows}
    small_rows = []
    for info in model_linears(model):
        name = info.name
        if info.block is not None:
            name = name.replace(f"blocks.{info.block}.", f"blocks.{picked[info.block]}.", 1)
        small_rows.append(replace(rows[name], name=info.name))
    return PrecisionTable(tuple(small_rows))


def in_high_precision(table: PrecisionTable) -> PrecisionTable:
    """The same linears, none of them quantized."""
    return PrecisionTable(tuple(replace(row, precision=LinearPrecision()) for row in table.rows))


def over_whole_tensors(table: PrecisionTable) -> PrecisionTable:
    """The same recipes with every `amax_scope` that depends on the layout widened to the logical tensor."""
    narrow = (AmaxScope.shard, AmaxScope.expert_call)

    def widen(operand: Operand) -> Operand:
        return replace(operand, amax_scope=AmaxScope.tensor) if operand.amax_scope in narrow else operand

    return PrecisionTable(tuple(replace(row, precision=row.precision.with_operands(widen)) for row in table.rows))
