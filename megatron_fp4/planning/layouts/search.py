"""Every layout of a world that fits batch, schedule, model, precision and memory, ranked by the time that is expected.

A layout is tp x pp x cp x micro batch x schedule; of the three ways to recompute, the lightest that fits is taken. The
fastest are tried first, so memory, which is counted in the layers, is counted only until enough have fitted: what is
slower than the slowest one shown is not tried. Each layout that falls out is counted by the first reason against it.

Not here: stage splits by hand and more virtual stages than a schedule needs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from megatron_fp4.models.decoder import Recompute
from megatron_fp4.planning.backend import forecast_backend
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.time import KINDS
from megatron_fp4.planning.layouts.batches import batch_section
from megatron_fp4.planning.layouts.choices import MICRO_BATCHES, Choices, TimedLayout
from megatron_fp4.planning.layouts.chosen import ChosenLayout
from megatron_fp4.planning.memory import least_memory, memory_section
from megatron_fp4.train.config import RunConfig

DAY = 86400


def search(
    config: RunConfig, site: Site, wanted: int = 10, micro_batches: Sequence[int] = MICRO_BATCHES
) -> dict[str, Any]:
    """The `wanted` fastest layouts that fit, why the others fell out, and batch sizes that open more."""
    config, choice = forecast_backend(config, site.machine.gpu)
    run = Choices(config, site, micro_batches)
    layouts = run.layouts()
    numbers = itertools.count()
    heap: list[tuple[float, int, ChosenLayout | TimedLayout]] = [
        (run.at_best(one), next(numbers), one) for one in layouts
    ]
    heapq.heapify(heap)
    fitting: list[dict[str, Any]] = []
    usable = site.assumptions.memory_share * site.machine.gpu.memory_gb * 1e9
    while heap and len(fitting) < wanted:
        _, _, entry = heapq.heappop(heap)
        if isinstance(entry, ChosenLayout):
            timed = run.timed(entry)
            heapq.heappush(heap, (timed.time.expected, next(numbers), timed))
            continue
        largest = _memory(entry, usable)
        if largest <= usable:
            fitting.append(_entry(entry, largest))
        elif heavier := _next_recompute(entry.layout):
            heapq.heappush(heap, (run.at_best(heavier), next(numbers), heavier))
        else:
            run.fallen["memory"] += 1
    return {
        "gpus": site.num_gpus,
        "gpu": site.machine.gpu.name,
        "backend": {"name": config.precision.backend.name, "reason": str(choice or "")},
        "global_batch": config.train.global_batch,
        "memory_share": site.assumptions.memory_share,
        "tried": len(layouts) + sum(run.fallen.values()) - run.fallen["memory"],
        "fitting": fitting,
        "fallen": dict(run.fallen),
        "slower": len(heap),
        "batches": batch_section(config, site.num_gpus),
    }


def _next_recompute(layout: ChosenLayout) -> ChosenLayout | None:
    modes = [mode.name for mode in Recompute]
    following = modes[modes.index(layout.recompute) + 1 :]
    return replace(layout, recompute=following[0]) if following else None


def _memory(timed: TimedLayout, usable: float) -> float:
    """The most bytes on any rank; infinite where weights, gradients and state alone are more than `usable`."""
    if least_memory(timed.checked.config.model, timed.pipeline, timed.settings) > usable:
        return math.inf
    largest: float = memory_section(timed.checked.config.model, timed.pipeline, timed.settings, 0.0)["largest"]
    return largest


def _entry(timed: TimedLayout, largest: float) -> dict[str, Any]:
    days = timed.checked.config.total_steps / DAY
    return {
        **asdict(timed.layout),
        "overrides": timed.layout.overrides,
        "microbatches": timed.settings.num_microbatches,
        "idle": timed.idle,
        "days": {kind: timed.time.seconds(kind) * days for kind in KINDS},
        "dominating": max(timed.time.terms, key=lambda name: timed.time.terms[name]),
        "memory_bytes": largest,
    }
