"""A small model with every structural feature of a large one, for checks on a laptop.

A parallel layout can go wrong per kind of block, per precision of a linear and per feature (grouped heads,
tied embeddings, gating, documents, dropout), not per size. So kinds are kept and sizes go down:

    blocks      one of each (letter, precision of its linears) at least, then as many as the layouts have stages, spread
                evenly over the model and in its order; their precision is that of the block they stand for
    heads       kv heads: one per tensor-parallel rank, at least two if the model has several; query heads: the model's
                ratio, at most 2; Mamba-2 heads and groups: as many as a rank's shape must be a multiple of
    widths      the smallest that every recipe and every layout divide
    experts     as many as every ep divides, at least 8; at most 3 of a token, groups as they are
    vocabulary  101, which no tensor-parallel size divides, unless the head is quantized
    tokens      samples of 64 tokens or more; microbatches of one sample; a global batch that suits every layout
    batch ramp  if there is one: two steps of that batch, one of twice and one of three times it, then four times
    learning    the rate is constant, at most 1e-4: larger steps amplify rounding, not bugs
    kernels     torch's, whatever the run uses: the layouts are tried on CPUs
    overlap     `auto` is on, as on GPUs; buckets are small enough that several leave during a backward
    window      if there is one: 24 tokens, which hides some of every sample
    rotation    half of each head where it is a part

Kept as they are: activation, rotary base and scaling, QK-norm, biases, tied embeddings, dropout, norm and its place,
initialisation, precision recipes (of the first phase), the rest of the optimizer, document handling, recompute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_fp4.comm.config import Overlap
from megatron_fp4.data.ramp import BatchRampConfig, batch_sizes
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.pipeline.schedules import check_pipeline
from megatron_fp4.precision.config import ComputeDtype
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.proofs.layouts import Layout
from megatron_fp4.proofs.parity import Case
from megatron_fp4.proofs.shrink_parts import (
    check_layouts,
    first_table,
    in_high_precision,
    over_whole_tensors,
    pick_blocks,
    quantization_unit,
    small_experts,
    small_table,
)
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.refusals.effect import check_distillation
from megatron_fp4.train.refusals.requirements import by_torch

MAX_GLOBAL_BATCH = 64
MAX_LR = 1e-4
SMALL_BUCKET_MIB = 0.25  # the small model fills several
DEFAULT_VOCABULARY = 101


@dataclass(frozen=True)
class _Divisors:
    """What sizes must divide by: unit by the recipes, tp, cp and ep by the layouts."""

    unit: int
    tp: int
    cp: int
    ep: int


def shrink(config: RunConfig, layouts: Sequence[Layout]) -> list[Case]:
    """The cases `fp32`, `bf16` and, if anything is quantized, `recipe` (SR, amax over whole tensors, FP32 compute).

    Raises ValueError if no small global batch suits all layouts, or the model cannot be laid out in one of them.
    """
    config = by_torch(config)
    full = replace(config.model, vocab_size=config.model.vocab_size or DEFAULT_VOCABULARY)
    table = first_table(config.precision, full)
    divisors = _Divisors(
        math.lcm(quantization_unit(table), config.optim.moments.unit),
        math.lcm(*(layout.parallel.tp for layout in layouts)),
        math.lcm(*(layout.parallel.cp for layout in layouts)),
        math.lcm(*(layout.parallel.ep for layout in layouts)),
    )
    picked = pick_blocks(full, table, max(4, *(layout.num_stages for layout in layouts)))
    model = _small_model(full, picked, divisors, quantized_head=table["head"].quantized)
    small = replace(config, model=model, data=replace(config.data, seq_length=_seq_length(divisors)))
    small = _with_small_batches(_with_small_steps(small), layouts)
    recipe = small_table(table, picked, model)
    check_layouts(small, recipe, [layout.parallel for layout in layouts])
    for layout in layouts:
        check_distillation(replace(small, parallel=layout.parallel))
    high = in_high_precision(recipe)
    cases = [_case("fp32", small, high, ComputeDtype.fp32), _case("bf16", small, high, ComputeDtype.bf16)]
    if table.num_quantized_gemms:
        cases.append(_case("recipe", small, over_whole_tensors(recipe), ComputeDtype.fp32))
    return cases


def _with_small_steps(config: RunConfig) -> RunConfig:
    def on(setting: Overlap) -> Overlap:
        return Overlap.always if setting is Overlap.auto else setting

    optim = config.optim
    small = replace(optim, overlap_reduce=on(optim.overlap_reduce), overlap_gather=on(optim.overlap_gather))
    small = replace(small, bucket_mib=SMALL_BUCKET_MIB, lr=min(optim.lr, MAX_LR), min_lr=0.0, compile=False)
    return replace(config, optim=small)


def _case(name: str, config: RunConfig, table: PrecisionTable, dtype: ComputeDtype) -> Case:
    if name == "fp32":  # what a layout changes is seen to 7 digits; a moment that is rounded the other way hides it
        config = replace(config, optim=config.optim.with_fp32_moments())
    return Case(name, replace(config, precision=replace(config.precision, compute_dtype=dtype)), table)


def _small_model(full: ModelConfig, picked: list[int], by: _Divisors, *, quantized_head: bool) -> ModelConfig:
    unit, tp = by.unit, by.tp
    S = _seq_length(by)
    width, chunk = max(32, unit), math.gcd(S // (2 * by.cp), S // (by.cp * tp))
    kv_heads = math.lcm(tp, 2) if full.num_kv_heads > 1 else tp
    groups = math.lcm(tp, 2) if full.mamba_num_groups > 1 else tp
    return replace(
        full.with_blocks("".join(full.blocks[index] for index in picked)),
        hidden=max(64, unit),
        ffn_hidden=width * tp,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * min(2, full.num_heads // full.num_kv_heads),
        head_dim=unit,
        rope_fraction=0.5 if full.rope_fraction < 1 else 1.0,
        sliding_window=min(full.sliding_window, 24),
        vocab_size=unit * tp * 2 if quantized_head else max(DEFAULT_VOCABULARY, tp),
        mamba_num_heads=math.lcm(unit * tp, groups) if full.mamba_num_heads else 0,
        mamba_head_dim=4,
        mamba_num_groups=groups if full.mamba_num_heads else full.mamba_num_groups,
        mamba_state=unit,
        mamba_chunk=16,
        moe=small_experts(full.moe, by.ep, width=width, shared_width=width * tp, chunk=chunk),
    )


def _seq_length(by: _Divisors) -> int:
    """At least 64. Chunks of a zig-zag shard hold whole quantization blocks, so that Wgrad's blocks are those of one
    process, and tensor-parallel ranks hold equal numbers of tokens."""
    step = math.lcm(2 * by.cp * by.unit, by.cp * by.tp)
    return step * -(-64 // step)


def _with_small_batches(config: RunConfig, layouts: Sequence[Layout]) -> RunConfig:
    """The smallest batches, from 4 samples on, that every layout accepts."""
    step = math.lcm(*(layout.parallel.dp for layout in layouts))
    for batch in range(step, MAX_GLOBAL_BATCH + 1, step):
        ramp, largest = BatchRampConfig(), batch
        if config.train.batch_ramp.ramp_samples:
            ramp, largest = BatchRampConfig(batch, batch, 6 * batch), 4 * batch
        sizes = batch_sizes(ramp, largest)
        if batch >= 4 and all(_suits(layout, size) for layout in layouts for size in sizes):
            small = replace(config.train, micro_batch=1, global_batch=largest, batch_ramp=ramp)
            return replace(config, train=small)
    names = ", ".join(layout.name for layout in layouts)
    raise ValueError(f"no global batch up to {MAX_GLOBAL_BATCH} suits all of {names}; check them in several calls")


def _suits(layout: Layout, batch: int) -> bool:
    try:
        check_pipeline(layout.parallel, batch // layout.parallel.dp)
    except ValueError:
        return False
    return True
