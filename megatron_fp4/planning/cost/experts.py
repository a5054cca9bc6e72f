"""What routed experts cost beside the FLOPs of their products: padding, grouped products, rows that are moved about.

Every expert is taken to get the same number of rows, as a balanced router sees to; where one gets twice the mean
(MaxVio 1), its rank works longer, and everybody waits for it.

Not here: the bytes between ranks (traffic.py), which link they take (links.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Recompute, StageRange, whole_model
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.links import Path
from megatron_fp4.planning.held import num_mixtures, stage_linears
from megatron_fp4.planning.idle import PipelineLayout
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision.table import gemm_format
from megatron_fp4.train.telemetry.peaks import rate_of

COPIES = 2
"""Of each row and direction: packed for its way and sorted at its end, read and written each time."""


@dataclass(frozen=True)
class ExpertTime:
    """Seconds a step of the pipeline rank that has most.

    moving: rows, between ranks and in memory. grouped: products of experts, beyond dense ones of their FLOPs.
    """

    moving: float
    grouped: float

    @staticmethod
    def of(
        config: ModelConfig,
        pipeline: PipelineLayout,
        settings: RankSettings,
        path: Path | None,
        sent: float,
        site: Site,
    ) -> ExpertTime:
        """path: what rows cross on their way; None without experts. sent: bytes a step between ranks."""
        if path is None:
            return ExpertTime(0.0, 0.0)
        directions = 6 if settings.recompute is Recompute.full else 4
        held = [tuple(stages.values()) for stages in pipeline.chunks]
        mixtures = settings.num_microbatches * max(num_mixtures(config, stages) for stages in held)
        row = (config.moe.latent or config.hidden) * settings.dtype.itemsize
        copied = mixtures * directions * COPIES * 2 * settings.routed(config.moe).rows * row
        memory = 1e9 * site.machine.memory_gb_per_second * site.assumptions.quantizer_efficiency
        # the first exchange of a mixture is one of counts
        messages = mixtures * (directions + 1) * path.latency
        grouped = settings.num_microbatches * max(_grouped_seconds(config, stages, settings, site) for stages in held)
        return ExpertTime(path.exchange_seconds(sent) + messages + copied / memory, grouped)


def _grouped_seconds(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings, site: Site) -> float:
    """Seconds a microbatch beyond dense products of the same FLOPs: `grouped_share` of their speed, rows of padding."""
    rows, seconds = settings.routed(config.moe).rows, 0.0
    for info in (info for stage in stages for info in stage_linears(config, stage) if info.num_experts):
        longer = settings.rows(info, config.moe) / rows / site.assumptions.grouped_share - 1
        for gemm in settings.precision(info.name).gemms:
            rate = rate_of(gemm_format(gemm), site.machine.gpu)
            share = site.assumptions.efficiency * (site.machine.fp4_share if rate == "fp4" else 1.0)
            times = info.uses * (2 if gemm.name == "fprop" and settings.recompute is Recompute.full else 1)
            flops = 2.0 * rows * info.in_features * info.out_features
            seconds += times * longer * flops / site.machine.gpu.rate(rate) / share
    return seconds


def padding_share(config: ModelConfig, settings: RankSettings) -> float:
    """Rows of padding over rows, of the experts' linears that have most of it."""
    routed = [info for info in stage_linears(config, whole_model(config)) if info.num_experts]
    rows = settings.routed(config.moe).rows
    return max((settings.rows(info, config.moe) / rows - 1 for info in routed), default=0.0)
