"""Memory of one rank, by kind, from the sizes of a model and its layout.

One idea: what a rank keeps is a sum over parameters (state) and over mixers (tensors that the backward pass needs),
each with a known number of bytes per token; on top comes the largest thing that is alive only for a moment. The
formulas follow the layers line by line and are tested against tensors counted in real steps.

Letters as in layers/layer_context.py; T = tokens of a microbatch on a context-parallel rank. Not here: the allocator's
fragmentation, CUDA's and NCCL's own memory (a few GB), and what other stages do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_fp4.layers.fused.loss import LossImpl
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.models.block import MIXERS, LinearInfo, block_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import stage_parameters
from megatron_fp4.models.decoder import StageRange

FP32 = 4


@dataclass(frozen=True)
class MemorySettings:
    """What decides the memory besides the model.

    recompute: blocks keep only their input. compute_bytes: of weights and activations (2 for BF16). fused_norm: the
    RMSNorm kernel keeps one FP32 copy of its input (CUDA), otherwise two (CPU). weight_copies: bytes per element of the
    quantized copies that the backend keeps of a linear's weight, by name. emulated: GEMM operands are dequantized, and
    weight gradients computed from FP32 copies of them. num_microbatches: per step.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    micro_batch: int = 1
    seq_length: int = 8192
    recompute: bool = False
    compute_bytes: int = 2
    fused_norm: bool = True
    keep_documents_apart: bool = False
    emulated: bool = False
    weight_copies: Mapping[str, float] = field(default_factory=dict)
    num_microbatches: int = 1

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch * self.seq_length // self.cp


def stage_memory(
    config: ModelConfig, stage: StageRange, settings: MemorySettings, in_flight: float
) -> dict[str, float]:
    """Bytes on a rank of one stage, by kind. in_flight: microbatches whose activations are held at once."""
    parameters = sum(parameter.local_numel(settings.tp) for parameter in stage_parameters(config, stage))
    blocks = range(stage.first, stage.stop)
    saved = [saved_by_block(index, config, settings) for index in blocks]
    row_bytes = settings.tokens / settings.tp * config.hidden
    activations = in_flight * (row_bytes * settings.compute_bytes * len(saved) if settings.recompute else sum(saved))
    if settings.recompute:
        activations += max(saved)  # of the block that is being computed again
    working = [block_working_set(index, config, settings) for index in blocks]
    if stage.has_head:
        activations += in_flight * _norm_and_input(config, settings)
        working.append(head_working_set(config, settings))
    return {
        "weights": float(parameters * settings.compute_bytes),
        "quantized weights": _weight_copies(config, stage, settings),
        "main gradients": float(parameters * FP32),
        "optimizer": _optimizer_bytes(settings) * parameters / (settings.dp * settings.cp),
        "buffers": _buffers(parameters, stage, settings, row_bytes * settings.compute_bytes),
        "activations": activations,
        "working set": max(working),
    }


def _optimizer_bytes(settings: MemorySettings) -> float:
    """Per parameter: two moments, and a master of what is not its own."""
    return FP32 * (3.0 if settings.compute_bytes < FP32 else 2.0)


def _buffers(parameters: int, stage: StageRange, settings: MemorySettings, activation: float) -> float:
    """What collectives receive: this rank's part of the summed gradients; and torch's pipeline stages, which keep one
    buffer per microbatch for every activation and gradient that arrives."""
    replicas = settings.dp * settings.cp
    sums = FP32 * parameters / replicas if replicas > 1 else 0.0
    arriving = (not stage.has_embedding) + (not stage.has_head)
    return sums + settings.num_microbatches * arriving * activation


def rank_memory(
    config: ModelConfig, chunks: Sequence[StageRange], settings: MemorySettings, in_flight: float
) -> dict[str, float]:
    """Bytes on a rank that holds several stages (virtual stages)."""
    parts = [stage_memory(config, chunk, settings, in_flight) for chunk in chunks]
    total = {kind: sum(part[kind] for part in parts) for kind in parts[0]}
    return total | {"working set": max(part["working set"] for part in parts)}


def _weight_copies(config: ModelConfig, stage: StageRange, settings: MemorySettings) -> float:
    total = 0.0
    for index in range(stage.first, stage.stop):
        for info in block_linears(index, config):
            rows, columns = info.local_shape(settings.tp)
            total += rows * columns * settings.weight_copies.get(info.name, 0.0)
    if stage.has_head:
        rows = -(-config.vocab_size // settings.tp)
        total += rows * config.hidden * settings.weight_copies.get("head", 0.0)
    return total


def _norm_and_input(config: ModelConfig, settings: MemorySettings) -> float:
    """An RMSNorm on T/tp rows (its input, in FP32 for torch's kernel, and the inverse root mean square), and the whole
    rows that a linear keeps."""
    input_bytes = FP32 * (1 if settings.fused_norm else 2)
    if config.norm_impl is not NormImpl.torch:
        input_bytes = settings.compute_bytes
    norm = settings.tokens / settings.tp * (input_bytes * config.hidden + FP32)
    return norm + settings.tokens * config.hidden * settings.compute_bytes


def saved_by_block(index: int, config: ModelConfig, settings: MemorySettings) -> float:
    """Bytes that the forward pass of one microbatch through block `index` keeps for its backward pass."""
    total = 0.0
    for mixer in MIXERS[config.blocks[index]]:
        total += _norm_and_input(config, settings)
        if config.dropout:
            total += settings.tokens / settings.tp * config.hidden * settings.compute_bytes
        per_token = {"attention": _attention, "mlp": _mlp, "mamba": _mamba}[mixer](config, settings)
        total += settings.tokens * per_token
    return total


def _attention(config: ModelConfig, settings: MemorySettings) -> float:
    """The fused projection; rotated q and k; output and log-sum-exp; gathered keys and values; a document mask."""
    a, tp, cp = settings.compute_bytes, settings.tp, settings.cp
    query = config.num_heads * config.attention_head_dim / tp
    key = config.num_kv_heads * config.attention_head_dim / tp
    total = a * (query + 2 * key) + a * query + FP32 * config.num_heads / tp
    if config.rope_base:
        total += a * (query + key) + FP32 * config.attention_head_dim
    if cp > 1:
        total += a * 2 * key * cp + a * query
    if settings.keep_documents_apart:
        total += a * settings.seq_length  # the mask has a row of keys per query
    return total


def _mlp(config: ModelConfig, settings: MemorySettings) -> float:
    """Squared ReLU keeps relu(h) and its square; SwiGLU gate|up, silu(gate) and the product."""
    factor = 4 if config.activation is Activation.swiglu else 2
    return factor * settings.compute_bytes * config.ffn_hidden / settings.tp


def _mamba(config: ModelConfig, settings: MemorySettings) -> float:
    """The two ends of what is computed again: the fused projection, and the gated output."""
    states = config.mamba_num_groups * config.mamba_state
    fused = 2 * config.mamba_inner + 2 * states + config.mamba_num_heads
    return settings.compute_bytes * (fused + config.mamba_inner) / settings.tp


def block_working_set(index: int, config: ModelConfig, settings: MemorySettings) -> float:
    """Largest amount that is alive only while a part of block `index` runs backward."""
    parts = [_linear_working_set(info, config, settings) for info in block_linears(index, config)]
    if "mamba" in MIXERS[config.blocks[index]]:
        parts.append(settings.tokens * _scan_working_set(config, settings))
    return max(parts)


def _linear_working_set(info: LinearInfo, config: ModelConfig, settings: MemorySettings) -> float:
    """dy and dx; where emulated, the dequantized copies of dy, FP32 copies of dy and x, and the FP32 product."""
    rows, columns = info.local_shape(settings.tp)
    T, a = settings.tokens, settings.compute_bytes
    total = float(a * T * (rows + columns))
    if settings.emulated:
        quantized = settings.weight_copies.get(info.name, 0.0) > 0
        casts = FP32 if a < FP32 else 0
        total += T * rows * (casts + (a if quantized else 0)) + T * columns * casts + FP32 * rows * columns
    return total


def _scan_working_set(config: ModelConfig, settings: MemorySettings) -> float:
    """Per token, all FP32, as counted: either the gated norm's backward on top of the recomputed mixer (15 tensors of
    its width, the convolution's, the chunks' states, two of all pairs in a chunk), or later the pairs' gradients."""
    chunk, inner, heads = config.mamba_chunk, config.mamba_inner, config.mamba_num_heads
    groups, state = config.mamba_num_groups, config.mamba_state
    pairs, states, channels = heads * chunk, inner * state / chunk, inner + 2 * groups * state
    at_norm = 2 * pairs + 15 * inner + 3 * channels + 4 * states + groups * chunk
    at_pairs = 4 * pairs + 8 * inner
    return FP32 * max(at_norm, at_pairs) / settings.tp


def head_working_set(config: ModelConfig, settings: MemorySettings) -> float:
    """Logits, their FP32 softmax and its gradient (te: the gradient is written over a copy); then the head's own."""
    vocabulary = -(-config.vocab_size // settings.tp)
    a = settings.compute_bytes
    each = 2 * a if config.loss_impl is LossImpl.te else 2 * FP32 + (a if a < FP32 else 0)
    logits = settings.tokens * vocabulary * each
    info = LinearInfo("head", None, config.hidden, {"": config.vocab_size}, column=True)
    return max(float(logits), _linear_working_set(info, config, settings))
