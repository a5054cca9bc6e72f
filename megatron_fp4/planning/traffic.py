"""Bytes that one rank sends in a step, by axis of the mesh.

One idea: every collective of the layers is an all-gather or reduce-scatter of known size, in which each of n ranks
sends (n - 1) / n of the whole, or an all-reduce, which is both. Which of them hide behind computation is not decided
here.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fp4.models.block import MIXERS
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import stage_parameters
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.planning.memory import FP32, MemorySettings

LOSS_BYTES = 4 + 3 * 8
"""Per token, reduced over the ranks that hold parts of the vocabulary (layers/loss.py)."""


def bytes_sent(
    config: ModelConfig, chunks: Sequence[StageRange], settings: MemorySettings, num_microbatches: int
) -> dict[str, float]:
    """Per step, for a rank that holds the stages `chunks`.

    tensor: rows gathered before column-parallel and scattered after row-parallel linears, forward and backward; per
    token of the loss the largest logit (FP32) and three FP64 sums; once a step the gradients of replicated parameters.
    context: keys and values, states of Mamba-2. pipeline: activations forward, their gradients back, except between two
    of `chunks` (the point of a V). data: FP32 gradients reduce-scattered once a step, parameters gathered.
    """
    mixers = [mixer for c in chunks for index in range(c.first, c.stop) for mixer in MIXERS[config.blocks[index]]]
    rows = float(settings.tokens * config.hidden * settings.compute_bytes)
    passes = 6 if settings.recompute else 4
    collectives = passes * len(mixers) + 2 * sum(c.has_embedding + c.has_head for c in chunks)
    inside = {c.first for c in chunks} & {c.stop for c in chunks}  # where one stage hands over to the next on this rank
    borders = sum((not c.has_embedding) + (not c.has_head) for c in chunks) - 2 * len(inside)
    context = sum(_context_bytes(mixer, config, settings) for mixer in mixers)
    held = [parameter for c in chunks for parameter in stage_parameters(config, c)]
    parameters = sum(parameter.local_numel(settings.tp) for parameter in held)
    replicated = sum(parameter.numel for parameter in held if parameter.sharded is None)
    reduced = num_microbatches * any(c.has_head for c in chunks) * settings.tokens * LOSS_BYTES + replicated * FP32
    replicas = settings.dp * settings.cp
    return {
        "tensor": (num_microbatches * collectives * rows + 2 * reduced) * _share(settings.tp),
        "context": num_microbatches * context,
        "pipeline": num_microbatches * borders * rows / settings.tp,
        "data": parameters * (FP32 + settings.compute_bytes) * _share(replicas),
    }


def _share(size: int) -> float:
    return (size - 1) / size


def _context_bytes(mixer: str, config: ModelConfig, settings: MemorySettings) -> float:
    """Per microbatch: forward, backward, and once more for what is computed again."""
    others = settings.cp - 1
    passes = 3 if settings.recompute else 2
    if mixer == "attention":
        key = config.num_kv_heads * config.attention_head_dim / settings.tp
        return passes * others * settings.tokens * 2 * key * settings.compute_bytes
    if mixer == "mamba":
        states = 2 * settings.micro_batch * config.mamba_inner * config.mamba_state / settings.tp
        return (passes + 1) * others * states * FP32
    return 0.0
