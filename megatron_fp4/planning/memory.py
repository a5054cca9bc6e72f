"""Memory of one rank, by kind: state by arithmetic, activations counted in the layers (footprint.py).

Activations are those of the microbatches that the schedule's order holds at once; on top comes the working set, what is
alive only for a moment while one part of a stage runs, and the part of the summed gradients that this rank receives,
which arrives beside the last backward pass.

Not here: the allocator's fragmentation, and CUDA's and NCCL's own memory (a few GB).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.pipeline.order import Work, in_flight
from megatron_fp4.planning.footprint import FP32, Footprint, stage_footprint
from megatron_fp4.planning.held import (
    GradientBytes,
    HeldElements,
    bytes_per_parameter,
    kept_bytes,
    opened_bytes,
    stage_linears,
)
from megatron_fp4.planning.idle import PipelineLayout
from megatron_fp4.planning.muon import MuonShare
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.stand_ins import DEQUANTIZING, stored_bytes
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.spec import LinearPrecision

ONE_MICROBATCH = (Work("F", 0, 0, 1), Work("B", 0, 0, 2))
"""What a rank without a pipeline does again and again."""


def memory_section(
    config: ModelConfig, pipeline: PipelineLayout, settings: RankSettings, gpu_bytes: float
) -> dict[str, Any]:
    """One entry per pipeline rank. gpu_bytes: memory of a GPU."""
    ranks, totals = [], []
    for stages, works in zip(pipeline.chunks, pipeline.order, strict=True):
        kinds = rank_memory(config, stages, settings, works)
        microbatches = in_flight(works) / len(stages)  # over all chunks
        totals.append(sum(kinds.values()))
        ranks.append({"in_flight": microbatches, "bytes": kinds, "total": totals[-1]})
    each = bytes_per_parameter(config, settings)
    return {"pipeline_ranks": ranks, "largest": max(totals), "gpu_bytes": gpu_bytes, "per_parameter": each}


def rank_memory(
    config: ModelConfig, stages: Mapping[int, StageRange], settings: RankSettings, works: Sequence[Work]
) -> dict[str, float]:
    """Bytes on a rank that holds `stages`, by number, and works through them in the order of `works`."""
    footprints = {number: stage_footprint(config, stage, settings) for number, stage in stages.items()}
    state = _state(config, stages.values(), settings)
    activations, most = _most_held(works, footprints)
    sums = HeldElements.of(config, stages.values(), settings).sums_at_once(settings)
    update = MuonShare.of(config, stages.values(), settings).update_bytes(settings)
    update += opened_bytes(config, stages.values(), settings)
    return {
        **state,
        "activations": float(activations),
        "working set": max(most, sums, update) - activations,  # these two when nothing else is left
    }


def stage_memory(config: ModelConfig, stage: StageRange, settings: RankSettings) -> dict[str, float]:
    """Bytes on a rank that holds one stage and runs one microbatch after the other."""
    return rank_memory(config, {0: stage}, settings, ONE_MICROBATCH)


def _most_held(works: Sequence[Work], footprints: Mapping[int, Footprint]) -> tuple[int, int]:
    """The most bytes that a rank keeps for backward passes at once; and the most with what is alive in passing.

    The two need not be at one moment: a stage with the head needs much in passing, and may keep little before it.
    """
    deferred = {(work.stage, work.microbatch) for work in works if work.kind == "W"}
    ends = {work.stage: work for work in works if work.kind != "F"}  # with it, the gradients of a stage are complete
    held = most_kept = most = arrived = 0
    for work in works:
        footprint, is_last = footprints[work.stage], ends[work.stage] is work
        if work.kind == "F":
            most = max(most, held + footprint.peak + arrived)
            held += footprint.kept
        elif work.kind == "W":
            most = max(most, held + arrived + (footprint.arrived if is_last else 0))
            held -= footprint.deferred
        else:
            held -= footprint.kept
            most = max(most, held + (footprint.last if is_last else footprint.peak) + arrived)
            held += footprint.deferred if (work.stage, work.microbatch) in deferred else 0
        arrived += footprint.arrived if is_last else 0
        most_kept = max(most_kept, held)
    return most_kept, most


def least_memory(config: ModelConfig, pipeline: PipelineLayout, settings: RankSettings) -> float:
    """Bytes on the rank that needs most before anything is computed: what `memory_section` says at least, at once."""
    return max(sum(_state(config, stages.values(), settings).values()) for stages in pipeline.chunks)


def _state(config: ModelConfig, stages: Collection[StageRange], settings: RankSettings) -> dict[str, float]:
    """What does not depend on the microbatches in flight."""
    held = HeldElements.of(config, stages, settings)
    compute_bytes = settings.dtype.itemsize
    return {
        "weights": float(held.trained * compute_bytes + held.untrained * FP32),
        "quantized weights": sum(_weight_copies(config, stage, settings) for stage in stages),
        "main gradients": GradientBytes.of(config, stages, settings).kept,
        "optimizer": kept_bytes(config, stages, settings),
        **({"teacher": float(held.total * compute_bytes)} if settings.distillation else {}),
        "buffers": sum(_receive_buffers(config, stage, settings) for stage in stages),
    }


def _receive_buffers(config: ModelConfig, stage: StageRange, settings: RankSettings) -> float:
    """torch's pipeline stages keep one buffer per microbatch for every activation and gradient that arrives."""
    arriving = (not stage.has_embedding) + (not stage.has_head)
    activation = settings.tokens / settings.tp * config.hidden * settings.dtype.itemsize
    return settings.num_microbatches * arriving * activation


def _weight_copies(config: ModelConfig, stage: StageRange, settings: RankSettings) -> float:
    total = 0.0
    for info in stage_linears(config, stage):
        rows, columns = info.local_shape(settings.tp)
        size = rows * columns * max(1, info.num_experts // settings.ep)
        precision = settings.precision(info.name)
        total += size * weight_copy_bytes(precision, settings.backend, settings.dtype.itemsize)
    return total


def weight_copy_bytes(precision: LinearPrecision, backend: BackendName, compute_bytes: int) -> float:
    """Bytes per element of the quantized copies of a weight for Fprop and Dgrad that a backend keeps."""
    copies = [operand for operand in (precision.fprop.w, precision.dgrad.w) if operand.quantized]
    if backend in DEQUANTIZING and len(copies) == 2 and copies[0] == copies[1] and copies[0].transposes:
        copies.pop()  # one copy serves both directions
    return sum(stored_bytes(operand, backend, compute_bytes) for operand in copies)
