"""Whether the rows of experts that share a scale come together in a layout; settings of experts that change nothing.

Not here: what must divide by ep (comm/config.py, models/layout.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from megatron_fp4.layers.moe.config import RouterScore
from megatron_fp4.models.block import model_linears
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig


def check_segments(config: RunConfig, tables: Iterable[PrecisionTable]) -> None:
    """Raises ValueError where a segment, whose rows a quantized expert gives one scale, would be on several ranks.

    tables: of the run's phases. A microbatch is on tp x cp ranks. Where these do not all share the same experts, only
    chunks of tokens that one rank has can be segments.
    """
    model, parallel = config.model, config.parallel
    S = config.data.seq_length
    if "E" not in model.letters:
        return
    tokens, chunk = config.train.micro_batch * S, model.moe.segment_tokens
    if chunk and tokens % chunk:
        raise ValueError(
            f"model.moe.segment_tokens = {chunk} does not divide the {tokens} tokens of a microbatch"
            f" (train.micro_batch * data.seq_length = {config.train.micro_batch} * {S}); choose a divisor of {tokens}"
        )
    tp, cp = parallel.tp, parallel.cp
    if parallel.ep % (tp * cp) == 0:
        return
    consecutive = math.gcd(tokens // (tp * cp), S // (2 * cp) if cp > 1 else tokens)
    if chunk and consecutive % chunk == 0:
        return
    for name in _quantized_experts(tables):
        raise ValueError(
            f"{name} is quantized, and parallel.ep = {parallel.ep} is no multiple of parallel.tp * parallel.cp ="
            f" {tp} * {cp} = {tp * cp}: tokens of a microbatch that share a scale would come to experts on different"
            f" ranks; set parallel.ep to a multiple of {tp * cp}, or model.moe.segment_tokens to a divisor of"
            f" {consecutive}, the consecutive tokens of a rank"
        )


def idle_expert_settings(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings of experts that change nothing beside the others -> why; see effect.py."""
    moe = config.model.moe
    if not moe.num_experts:
        return
    if moe.top_k == moe.num_experts:
        reason = f"model.moe.top_k = {moe.top_k} sends every token to all experts, so their load is even"
        for name in ("expert_bias", "bias_rate", "sequence_loss", "global_loss"):
            yield f"model.moe.{name}", reason
        if moe.score is RouterScore.softmax:
            yield "model.moe.normalize", f"a softmax over all of model.moe.top_k = {moe.top_k} experts has the sum 1"
    if moe.capacity_factor * moe.top_k >= moe.num_experts:
        share = moe.num_experts / moe.top_k
        reason = f"it is {share:g} or more, model.moe.num_experts / top_k: a whole segment fits, and no expert is full"
        yield "model.moe.capacity_factor", reason
    if moe.num_groups == moe.num_experts:
        for name in ("num_groups", "top_groups"):
            yield f"model.moe.{name}", f"a group is one expert: model.moe.num_experts = {moe.num_experts}"
    if not moe.capacity_factor and not _quantizes_experts(config):
        yield "model.moe.segment_tokens", "model.moe.capacity_factor = 0, and no linear of experts is quantized"


def _quantizes_experts(config: RunConfig) -> bool:
    try:
        plan = PrecisionPlan(config.precision, model_linears(config.model))
    except ValueError:
        return True  # whoever makes the plan of the run says what is wrong
    return any(_quantized_experts(table for _, table in plan.phases))


def _quantized_experts(tables: Iterable[PrecisionTable]) -> Iterator[str]:
    for table in tables:
        for row in table.rows:
            if ".moe.experts." in row.name and row.precision.quantized:
                yield row.name
