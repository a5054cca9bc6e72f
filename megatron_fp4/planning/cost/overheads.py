"""What a device does in a step besides matrix products: quantizers, the optimizer, and the all-reduces of scales.

Quantizers and optimizer are limited by memory: their bytes by the bandwidth. A tensor with an FP32 scale is read once
for its largest magnitude, and once more to be written as codes: all its copies in one pass, as the fused kernels of
Transformer Engine do, or each in a pass of its own, as those of the Triton backend.

Not here: the emulation's quantizers, which are many kernels and take many times as long.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.block import LinearInfo
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.optim.kept.choice import conversion_bytes
from megatron_fp4.planning.held import GradientBytes, HeldElements, stage_linears
from megatron_fp4.planning.muon import MuonShare
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.stand_ins import STORED_BYTES
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.operand import AmaxScope, Format, Operand
from megatron_fp4.precision.spec import LinearPrecision

UPDATE_BYTES = 4 + 4 * 3 + 4 * 3 + 4 + 2
"""Per parameter that a rank updates: gradient (for the norm too), master and two moments read; those three and the
BF16 weight written."""
MUON_BYTES = 2 * 4 + 4 * 2 * 2 + 2 + 6 * 2
"""The same by Muon: one moment; and in BF16 what is orthogonalized, its message, and the message that comes back."""


@dataclass(frozen=True)
class Overheads:
    """What one rank does beside products and messages.

    quantizer_bytes: read and written per microbatch. weight_bytes: the same for weights, once a step. scale_reductions:
    all-reduces of scales per microbatch. weight_reductions: once a step. optimizer_bytes,
    optimizer_flops: per step; the FLOPs are those of Muon, on the rank of the stage that has most.
    """

    quantizer_bytes: float
    weight_bytes: float
    scale_reductions: int
    weight_reductions: int
    optimizer_bytes: float
    optimizer_flops: float

    @staticmethod
    def of(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> Overheads:
        """The overheads of a rank that holds `stages`."""
        quantizer = weight = 0.0
        scales = weight_scales = 0
        for info in (info for stage in stages for info in stage_linears(config, stage)):
            for tensor, one in linear_quantizers(info, config.moe, settings).items():
                if tensor == "w":
                    weight += one.num_bytes
                    weight_scales += one.reduced
                else:
                    quantizer += one.num_bytes * info.uses
                    scales += one.reduced * info.uses
        held = HeldElements.of(config, stages, settings)
        muon = MuonShare.of(config, stages, settings)
        by_muon = muon.divided(settings)
        converted = {muon: conversion_bytes(settings.optim, muon=muon, dtype=settings.dtype) for muon in (False, True)}
        updated = (held.divided(settings) - by_muon) * (UPDATE_BYTES + converted[False])
        updated += by_muon * (MUON_BYTES + converted[True])
        gradients = GradientBytes.of(config, stages, settings)
        optimizer = gradients.common + gradients.experts + updated  # gradients are set to zero
        return Overheads(quantizer, weight, scales, weight_scales, optimizer, muon.flops)


@dataclass(frozen=True)
class Quantizer:
    """What is moved to quantize one tensor.

    read: bytes, those for its largest magnitude included. written: bytes of the copy for each GEMM, by the GEMM's name.
    reduced: whether a scale is reduced over the ranks that share the tensor.
    """

    read: float
    written: Mapping[str, float]
    reduced: bool

    @property
    def num_bytes(self) -> float:
        return self.read + sum(self.written.values())


def tensor_sizes(info: LinearInfo, moe: MoeConfig, settings: RankSettings) -> dict[str, float]:
    """Elements on a rank of x and dy of a microbatch, and of w; of routed experts together."""
    rows, columns = info.local_shape(settings.tp)
    tokens = settings.rows(info, moe)
    return {"x": tokens * columns, "dy": tokens * rows, "w": rows * columns * max(1, info.num_experts // settings.ep)}


def linear_quantizers(info: LinearInfo, moe: MoeConfig, settings: RankSettings) -> dict[str, Quantizer]:
    """The quantizers of x and dy in a microbatch, and of w once a step."""
    precision = settings.precision(info.name)
    ours = _quantizers(tensor_sizes(info, moe, settings), precision, settings)
    # a scale of experts is of one segment, whose rows are all on this rank
    return {tensor: replace(one, reduced=False) for tensor, one in ours.items()} if info.num_experts else ours


def quantizers(rows: int, columns: int, precision: LinearPrecision, settings: RankSettings) -> dict[str, Quantizer]:
    """The same of any linear that every token passes. rows, columns: of the weight on a rank."""
    sizes = {"x": settings.tokens * columns, "dy": settings.tokens * rows, "w": rows * columns}
    return _quantizers(sizes, precision, settings)


def _quantizers(sizes: Mapping[str, float], precision: LinearPrecision, settings: RankSettings) -> dict[str, Quantizer]:
    return {tensor: _quantizer(tensor, numel, precision, settings) for tensor, numel in sizes.items()}


def _quantizer(tensor: str, numel: float, precision: LinearPrecision, settings: RankSettings) -> Quantizer:
    uses = {gemm.name: dict(zip(gemm.tensors, gemm.operands, strict=True)) for gemm in precision.gemms}
    copies = {name: operands[tensor] for name, operands in uses.items() if tensor in operands}
    copies = {name: operand for name, operand in copies.items() if operand.quantized}
    if not copies:
        return Quantizer(0.0, {}, reduced=False)
    of_nvfp4 = [operand for operand in copies.values() if operand.format is Format.nvfp4]
    one_pass = settings.backend is not BackendName.triton or _same_codes(list(copies.values()))
    readings = bool(of_nvfp4) + (1 if one_pass else len(copies))
    return Quantizer(
        numel * settings.dtype.itemsize * readings,
        {name: numel * STORED_BYTES[operand.format] for name, operand in copies.items()},
        reduced=any(operand.amax_scope is AmaxScope.tensor for operand in of_nvfp4),
    )


def _same_codes(copies: Sequence[Operand]) -> bool:
    """Whether two copies are one, written in both directions."""
    return all(copy == copies[0] for copy in copies) and copies[0].transposes
