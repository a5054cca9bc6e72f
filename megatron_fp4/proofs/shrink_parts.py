"""Parts of the small model of shrink.py: which blocks it must have, what their linears become, and its experts.

The first two are functions of precision tables; other sizes and batches are shrink.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.layout import check_model_layout
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.operand import AmaxScope, Operand
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.experts import check_segments


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


def small_experts(full: MoeConfig, ep: int, *, width: int, shared_width: int, chunk: int) -> MoeConfig:
    """At least 8 experts, as many as `ep` divides, in groups of at least 2, at most 3 of a token. width: of an expert
    and of a projection; chunk: tokens of a segment, where the run has such."""
    if not full.num_experts:
        return full
    groups, top_k = full.num_groups, min(full.top_k, 3)
    number = step = math.lcm(ep, groups)
    while number < max(8, 2 * groups if groups > 1 else 0) or top_k > full.top_groups * (number // groups):
        number += step
    return replace(
        full,
        num_experts=number,
        top_k=top_k,
        ffn_hidden=width,
        shared_ffn_hidden=shared_width if full.shared_ffn_hidden else 0,
        latent=width if full.latent else 0,
        segment_tokens=chunk if full.segment_tokens else 0,
    )


def check_layouts(small: RunConfig, recipe: PrecisionTable, layouts: Sequence[ParallelConfig]) -> None:
    """Raises ValueError for a layout that the small model cannot have, or its quantized experts cannot."""
    seq_length = small.data.seq_length
    for parallel in layouts:
        check_model_layout(small.model, parallel, seq_length=seq_length, tokens=seq_length // parallel.cp)
        check_segments(replace(small, parallel=parallel), [recipe])
