"""Bytes that one rank sends in a step, by axis of the mesh.

Every collective of the layers is an all-gather or reduce-scatter of known size, in which each of n ranks sends
(n - 1) / n of the whole, or an all-reduce, which is both. Which of them hide behind computation is not decided here.
"""

from __future__ import annotations

from collections.abc import Collection

from megatron_fp4.comm.collectives import even_counts
from megatron_fp4.models.block import MIXERS
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Recompute, StageRange
from megatron_fp4.optim import Algorithm
from megatron_fp4.planning.held import GradientBytes, HeldElements, num_mixtures
from megatron_fp4.planning.muon import MuonShare
from megatron_fp4.planning.settings import RankSettings

FP32 = 4
INT64 = 8
ROW_TAG = FP32 + INT64
"""Bytes that travel with a row to an expert: its weight and its address."""
LOSS_BYTES = 4 + 3 * 8
"""Per token, reduced over the ranks that hold parts of the vocabulary (layers/loss.py)."""


def bytes_sent(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> dict[str, float]:
    """Bytes per step, for a rank that holds `stages`.

    tensor: rows gathered before column-parallel and scattered after row-parallel linears, forward and backward; per
    token of the loss the largest logit (FP32) and three FP64 sums; once a step the gradients of replicated parameters,
    of which each replica sums its part. context: keys, values and document numbers, states of Mamba-2. pipeline:
    activations forward, their gradients back, except between two of `stages` (the point of a V); gradients of a tied
    table. data: main gradients reduce-scattered once a step, parameters gathered. matrices: with Muon, at
    most, the elements of a rank to the owners of their matrices, and whole matrices back. experts: rows to the routed
    experts and back, if every expert gets the same; expert_data: as `data`, of routed experts.
    """
    depth = config.mtp.depth * any(s.has_head for s in stages)
    later = depth * config.mtp.pattern
    letters = "".join(config.blocks[s.first : s.stop] for s in stages) + later
    mixers = [mixer for letter in letters for mixer in MIXERS[letter]]
    compute_bytes = settings.dtype.itemsize
    rows = float(settings.tokens * config.hidden * compute_bytes)
    gathering = [mixer for mixer in mixers if mixer != "moe" or config.moe.shared_ffn_hidden]  # experts take own rows
    collectives = 4 * len(gathering) + 2 * sum(s.has_embedding + s.has_head for s in stages) + 4 * depth
    if settings.recompute is Recompute.full:  # it stops where nothing more is needed: before a block's last scatter
        collectives += 2 * len(gathering) - sum(letter != "E" or config.moe.shared_ffn_hidden > 0 for letter in letters)
    inside = {s.first for s in stages} & {s.stop for s in stages}  # where one stage hands over to the next on this rank
    borders = sum((not s.has_embedding) + (not s.has_head) for s in stages) - 2 * len(inside)
    context = sum(_context_bytes(mixer, config, settings) for mixer in mixers)
    attending = sum(
        any("attention" in MIXERS[letter] for letter in config.blocks[s.first : s.stop] + s.has_head * later)
        for s in stages
    )
    if settings.keep_documents_apart:  # gathered once for all layers of a stage
        context += (settings.cp - 1) * settings.tokens * INT64 * attending
    held, gradients = HeldElements.of(config, stages, settings), GradientBytes.of(config, stages, settings)
    loss_tokens = settings.num_microbatches * settings.tokens * any(s.has_head for s in stages) * (1 + depth)
    reduced = loss_tokens * LOSS_BYTES + held.replicated * FP32 / settings.replicas
    return {
        "tensor": (settings.num_microbatches * collectives * rows + 2 * reduced) * _share(settings.tp),
        "context": settings.num_microbatches * context,
        "pipeline": settings.num_microbatches * borders * rows / settings.tp + _tied_bytes(config, stages, settings),
        "data": (gradients.common + held.common * compute_bytes) * _share(settings.replicas),
        **_expert_bytes(config, num_mixtures(config, stages), held.experts, gradients.experts, settings),
        **_muon_bytes(config, stages, settings),
    }


def _share(size: int) -> float:
    return (size - 1) / size


def _expert_bytes(
    config: ModelConfig, count: int, elements: int, gradients: float, settings: RankSettings
) -> dict[str, float]:
    """count: of mixtures on the rank. elements, gradients: of routed experts, the latter in bytes. Empty without."""
    if not config.moe.num_experts:
        return {}
    row = (config.moe.latent or config.hidden) * settings.dtype.itemsize
    passes = 2 if settings.recompute is Recompute.full else 1
    exchanged = passes * (2 * row + ROW_TAG) + 2 * row + FP32  # backward: gradients of rows and of their weights
    rows = settings.num_microbatches * count * settings.routed(config.moe).rows
    return {
        "experts": rows * exchanged * _share(settings.ep),
        "expert_data": (gradients + elements * settings.dtype.itemsize) * _share(settings.expert_replicas),
    }


def _muon_bytes(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> dict[str, float]:
    if settings.optim.algorithm is not Algorithm.muon:
        return {}
    muon = MuonShare.of(config, stages, settings)
    alone = settings.replicas * settings.tp == 1
    return {"matrices": 0.0 if alone else settings.dtype.itemsize * (muon.divided(settings) + muon.largest)}


def _tied_bytes(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> float:
    """Bytes of the sum over the two copies of a table that the first and the last rank of a pipeline hold.

    Both ends on one rank share one copy. Each replica sums the part that it updates.
    """
    one_end = any(s.has_embedding for s in stages) != any(s.has_head for s in stages)
    if not (config.embeds_at_both_ends and one_end):
        return 0.0
    table = even_counts(config.vocab_size, settings.tp)[0] * config.hidden
    return 2 * FP32 * table / settings.replicas * _share(2)


def _context_bytes(mixer: str, config: ModelConfig, settings: RankSettings) -> float:
    """Bytes per microbatch: forward, backward, and once more for what is computed again."""
    others = settings.cp - 1
    if mixer == "attention":
        passes = 2 if settings.recompute is Recompute.none else 3
        key = config.num_kv_heads * config.attention_head_dim / settings.tp
        return others * settings.tokens * passes * 2 * key * settings.dtype.itemsize
    if mixer == "mamba":  # the part between its projections is always computed again
        passes = 4 if settings.recompute is Recompute.full else 3
        pieces = 2 * settings.micro_batch / settings.tp
        states = config.mamba_inner * config.mamba_state + config.mamba_num_heads  # and what survives of earlier ones
        channels = config.mamba_inner + 2 * config.mamba_num_groups * config.mamba_state
        tails = (config.mamba_conv - 1) * channels  # what the convolution looks back on
        return passes * others * pieces * (states * FP32 + tails * settings.dtype.itemsize)
    return 0.0
