"""What a rank holds, linears and elements of parameters: counted once per stage, for every layout.

A model with experts has tens of thousands of tensors, and a search asks for thousands of layouts, so what a layout
divides is summed by the size of the dimension that it divides.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from megatron_fp4.models.block import LinearInfo, model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import held_parameters
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.optim.config import Algorithm, OptimConfig
from megatron_fp4.optim.grad_buffer import MAX_IN_FLIGHT
from megatron_fp4.optim.kept.choice import bytes_per_element
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat
from megatron_fp4.optim.kept.part import CHUNK
from megatron_fp4.planning.footprint import BF16, FP32
from megatron_fp4.planning.settings import RankSettings

SPLITTING = 6
ROUNDING = {MomentFormat.bf16: 16, MomentFormat.int8: 20, MomentFormat.fp8: 28}
ROUNDING_SECOND = {MomentFormat.bf16: 16, MomentFormat.int8: 32, MomentFormat.fp8: 21}
"""Bytes per element that a master, and a moment beside its FP32 copy, take while they are made what is kept."""


@dataclass(frozen=True)
class HeldElements:
    """Elements on a rank: common, all but those of routed experts; of these `replicated` on every tensor-parallel rank,
    `tied` in a table whose copy another pipeline rank has too; experts: of the routed experts on it. untrained: in
    none of the others, FP32 without gradients and optimizer state, on every replica.
    """

    common: int
    replicated: int
    tied: int
    experts: int
    untrained: int

    @staticmethod
    def of(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> HeldElements:
        """The elements of a rank that holds `stages`: of the one with the remainder of an uneven vocabulary."""
        sizes = _sizes(config, tuple(stages))
        tp = settings.tp
        local = {
            kind: sum(numel // size * -(-size // tp) for (of_kind, size), numel in sizes.items() if of_kind == kind)
            for kind in ("sharded", "tied")
        }
        replicated, experts = sizes["whole", 1], sizes["experts", 1] // settings.ep
        common = local["sharded"] + local["tied"] + replicated
        return HeldElements(common, replicated, local["tied"], experts, sizes["untrained", 1])

    @property
    def trained(self) -> int:
        """What has gradients."""
        return self.common + self.experts

    @property
    def total(self) -> int:
        return self.trained + self.untrained

    def divided(self, settings: RankSettings) -> float:
        """Elements whose optimizer state is on this rank."""
        return self.common / settings.replicas + self.experts / settings.expert_replicas

    def sums_at_once(self, settings: RankSettings) -> float:
        """Bytes of summed gradients after the last backward pass; those of a tied table come when others are used.

        In BF16, whose sums have a place of their own, bytes of the messages of two buckets.
        """
        common = max(self.tied, self.common - self.tied) if settings.replicas > 1 else 0
        experts = self.experts if settings.expert_replicas > 1 else 0
        if settings.sums_in_bf16(dims=2):
            return BF16 * min(common + experts, MAX_IN_FLIGHT * settings.optim.bucket_numel)
        return FP32 * (common / settings.replicas + experts / settings.expert_replicas)


def kept_bytes(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> float:
    """Bytes of optimizer state between two steps on a rank that holds `stages`."""
    common = experts = 0.0
    sizes = _sizes_by_state(config, tuple(stages), settings.optim, settings.dtype.itemsize)
    for (expert, size, each), elements in sizes.items():
        if expert:
            experts += each * elements / settings.ep
        else:
            common += each * elements / size * -(-size // (settings.tp if size > 1 else 1))
    return common / settings.replicas + experts / settings.expert_replicas


@dataclass(frozen=True)
class GradientBytes:
    """kept: of main gradients on a rank, and beside those in BF16 of the FP32 sums of its own part. common, experts: of
    the main gradients that are summed over the replicas, and over the ranks that hold the same experts.
    """

    kept: float
    common: float
    experts: float

    @staticmethod
    def of(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> GradientBytes:
        """The bytes of a rank that holds `stages`."""
        kept, summed = 0.0, {False: 0.0, True: 0.0}
        for (expert, dims, size), elements in _sizes_by_gradient(config, tuple(stages)).items():
            local = elements / settings.ep if expert else elements / size * -(-size // (settings.tp if size > 1 else 1))
            replicas = settings.expert_replicas if expert else settings.replicas
            narrow = settings.sums_in_bf16(dims=dims, whole=size == 1 and not expert, expert=expert)
            each = BF16 if narrow else FP32
            kept += local * (each + (FP32 / replicas if narrow else 0.0))
            summed[expert] += local * each
        return GradientBytes(kept, summed[False], summed[True])


def bytes_per_parameter(config: ModelConfig, settings: RankSettings) -> dict[str, float]:
    """Bytes of the whole model: what every replica holds, and the optimizer state, which they divide."""
    whole = (StageRange(0, len(config.blocks), len(config.blocks)),)
    alone = replace(settings, tp=1, cp=1, dp=1, ep=1)
    elements = HeldElements.of(config, whole, alone).trained
    gradients = GradientBytes.of(config, whole, replace(alone, dp=settings.replicas)).kept
    return {
        "weights": settings.dtype.itemsize,
        "main gradients": gradients / elements,
        "optimizer": kept_bytes(config, whole, alone) / elements,
    }


def opened_bytes(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> float:
    """Bytes alive while a chunk of state that is not kept in FP32 is updated: at most one parameter of it."""
    optim = settings.optim
    beside = [SPLITTING] if optim.master is not MasterFormat.fp32 else []
    for kind, format in optim.moments.by_kind.items():
        if format is not MomentFormat.fp32 and (kind != "momentum" or optim.algorithm is Algorithm.muon):
            beside.append((ROUNDING_SECOND if kind == "exp_avg_sq" else ROUNDING)[format])
    if not beside:
        return 0.0
    elements = HeldElements.of(config, stages, settings).divided(settings)
    table = -(-config.vocab_size // settings.tp) * config.hidden * any(stage.has_embedding for stage in stages)
    linears = [info for stage in stages for info in stage_linears(config, stage)]
    sizes = [math.prod(one.local_shape(settings.tp)) * max(1, one.num_experts // settings.ep) for one in linears]
    return (FP32 * len(beside) + max(beside)) * min(CHUNK, elements, max(table, *sizes, 0))


def num_mixtures(config: ModelConfig, stages: Iterable[StageRange]) -> int:
    """Mixtures of experts that a token passes in these stages."""
    later = config.mtp.depth * config.mtp.pattern.count("E")
    return sum(
        config.blocks[stage.first : stage.stop].count("E") + (later if stage.has_head else 0) for stage in stages
    )


@functools.cache
def stage_linears(config: ModelConfig, stage: StageRange) -> tuple[LinearInfo, ...]:
    """The linears that a stage holds; what is outside the blocks is where the head is."""
    return tuple(
        info
        for info in model_linears(config)
        if (stage.has_head if info.block is None else stage.first <= info.block < stage.stop)
    )


@functools.cache
def _sizes_by_gradient(config: ModelConfig, stages: tuple[StageRange, ...]) -> Counter[tuple[bool, int, int]]:
    """(of routed experts; dimensions; size of the one that tp divides, or 1 where none is) -> elements."""
    sizes: Counter[tuple[bool, int, int]] = Counter()
    for one in filter(lambda one: one.trained, held_parameters(config, stages)):
        size = 1 if one.sharded is None or one.expert is not None else one.shape[one.sharded]
        sizes[one.expert is not None, len(one.shape), size] += one.numel
    return sizes


@functools.cache
def _sizes_by_state(
    config: ModelConfig, stages: tuple[StageRange, ...], optim: OptimConfig, weight_bytes: int
) -> Counter[tuple[bool, int, float]]:
    """(of routed experts; size of the dimension that tp divides, or 1; bytes of state an element) -> elements."""
    sizes: Counter[tuple[bool, int, float]] = Counter()
    for one in filter(lambda one: one.trained, held_parameters(config, stages)):
        size = 1 if one.sharded is None or one.expert is not None else one.shape[one.sharded]
        each = bytes_per_element(one.name, one.shape, optim, weight_bytes)
        sizes[one.expert is not None, size, each] += one.numel
    return sizes


@functools.cache
def _sizes(config: ModelConfig, stages: tuple[StageRange, ...]) -> Counter[tuple[str, int]]:
    """(experts, untrained, whole, sharded or tied; size of the dimension that tp divides, or 1) -> elements."""
    both_ends = any(stage.has_embedding for stage in stages) and any(stage.has_head for stage in stages)
    sizes: Counter[tuple[str, int]] = Counter()
    for parameter in held_parameters(config, stages):
        if parameter.expert is not None:
            sizes["experts", 1] += parameter.numel
        elif not parameter.trained:
            sizes["untrained", 1] += parameter.numel
        elif parameter.sharded is None:
            sizes["whole", 1] += parameter.numel
        else:
            tied = config.embeds_at_both_ends and parameter.kind == "embedding" and not both_ends
            sizes["tied" if tied else "sharded", parameter.shape[parameter.sharded]] += parameter.numel
    return sizes
