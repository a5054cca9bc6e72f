"""What a device does in a step besides matrix products: quantizers, the optimizer, and the all-reduces of scales.

Quantizers and optimizer are limited by memory: their bytes by the bandwidth. A tensor with an FP32 scale is read twice,
once for its largest magnitude, once to be written as codes; all its copies are made in one pass, as the fused kernels
of Transformer Engine do.

Not here: the emulation's quantizers, which are many kernels and take many times as long.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_fp4.models.block import block_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import stage_parameters
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.stand_ins import STORED_BYTES
from megatron_fp4.precision.operand import AmaxScope, Format, Operand
from megatron_fp4.precision.spec import LinearPrecision

CLEAR_BYTES = 4
"""Per parameter on a rank and step: its FP32 gradient is set to zero."""
UPDATE_BYTES = 4 + 4 * 3 + 4 * 3 + 4 + 2
"""Per parameter that a rank updates: gradient (for the norm too), master and two moments read; those three and the
BF16 weight written."""


@dataclass(frozen=True)
class Overheads:
    """What one rank does beside products and messages.

    quantizer_bytes: read and written per microbatch. weight_bytes: the same for weights, once a step. scale_reductions:
    all-reduces of scales per microbatch. weight_reductions: once a step. optimizer_bytes: per step.
    """

    quantizer_bytes: float
    weight_bytes: float
    scale_reductions: int
    weight_reductions: int
    optimizer_bytes: float

    @staticmethod
    def of(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> Overheads:
        """The overheads of a rank that holds `stages`."""
        quantizer = weight = 0.0
        scales = weight_scales = 0
        for rows, columns, precision in _linears(config, stages, settings):
            tensors = {
                "x": (settings.tokens * columns, [precision.fprop.x, precision.wgrad.x]),
                "dy": (settings.tokens * rows, [precision.dgrad.dy, precision.wgrad.dy]),
                "w": (rows * columns, [precision.fprop.w, precision.dgrad.w]),
            }
            for tensor, (numel, copies) in tensors.items():
                num_bytes, reduced = _quantize(numel, copies, settings.dtype.itemsize)
                if tensor == "w":
                    weight += num_bytes
                    weight_scales += reduced
                else:
                    quantizer += num_bytes
                    scales += reduced
        held = [parameter for stage in stages for parameter in stage_parameters(config, stage)]
        parameters = sum(parameter.local_numel(settings.tp) for parameter in held)
        optimizer = parameters * (CLEAR_BYTES + UPDATE_BYTES / settings.replicas)
        return Overheads(quantizer, weight, scales, weight_scales, optimizer)


def _linears(
    config: ModelConfig, stages: Collection[StageRange], settings: RankSettings
) -> Iterator[tuple[int, int, LinearPrecision]]:
    """Local rows and columns, and precision."""
    for stage in stages:
        for index in range(stage.first, stage.stop):
            for info in block_linears(index, config):
                yield *info.local_shape(settings.tp), settings.precision(info.name)
        if stage.has_head:
            yield -(-config.vocab_size // settings.tp), config.hidden, settings.precision("head")


def _quantize(numel: int, operands: list[Operand], compute_bytes: int) -> tuple[float, bool]:
    """Bytes that are read and written to quantize a tensor as all of `operands`; whether a scale is reduced."""
    copies = [operand for operand in operands if operand.quantized]
    if len(copies) == 2 and copies[0] == copies[1] and copies[0].transposes:
        copies.pop()  # the same codes, written once in both directions
        written = 2 * STORED_BYTES[copies[0].format]
    else:
        written = sum(STORED_BYTES[operand.format] for operand in copies)
    if not copies:
        return 0.0, False
    scaled = any(operand.format is Format.nvfp4 for operand in copies)
    shared = any(operand.format is Format.nvfp4 and operand.amax_scope is AmaxScope.tensor for operand in copies)
    return numel * (compute_bytes * (1 + scaled) + written), shared
