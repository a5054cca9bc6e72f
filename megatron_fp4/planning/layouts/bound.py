"""A quick bound of a layout's time, which its real time hardly undercuts: a search times the most promising first.

Not here: stages, quantizers, latencies, all of which make a step longer (cost/time.py).
"""

from __future__ import annotations

import functools

from megatron_fp4.models.count import count_flops
from megatron_fp4.models.decoder import Recompute, whole_model
from megatron_fp4.pipeline.schedules import stages_per_rank
from megatron_fp4.planning.cost.hardware import Site
from megatron_fp4.planning.cost.links import paths
from megatron_fp4.planning.cost.time import seconds_per_token
from megatron_fp4.planning.held import HeldElements
from megatron_fp4.planning.idle import PipelineShape, idle_part
from megatron_fp4.planning.layouts.chosen import ChosenLayout
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig

MANY = 256
"""Computations of a pipeline whose order is not looked at."""


class TimeBound:
    """The bounds of all layouts of one run. flops: of a token."""

    def __init__(self, config: RunConfig, site: Site) -> None:
        self.config, self.site = config, site
        self.flops = count_flops(config.model, config.data.seq_length)
        self._at_peak: dict[tuple[int, int, str], float] = {}

    def seconds(self, layout: ChosenLayout, table: PrecisionTable) -> float:
        """Seconds of a step. table: precision in the first phase of the run."""
        config, site = self.config, self.site
        model = config.model
        parallel = layout.applied_to(config).parallel
        links = paths(parallel, layout.dp, site.machine, site.assumptions.rails, with_experts=bool(self._held.experts))
        microbatches = config.train.global_batch // (layout.dp * layout.micro_batch)
        per_token = self._per_token(layout, table) / site.assumptions.efficiency
        products = per_token * config.tokens_per_step / site.num_gpus
        if microbatches * layout.pp < MANY:
            idle = idle_part(parallel, microbatches)
        else:
            idle = PipelineShape(layout.schedule, layout.pp, microbatches, stages_per_rank(parallel)).bubble
        messages = 4 * model.num_residual_additions / layout.pp * microbatches
        rows = layout.micro_batch * config.data.seq_length / layout.cp * model.hidden * 2
        tensor = messages * (links["tensor"].seconds(rows * (1 - 1 / layout.tp)) + links["tensor"].latency)
        busy = (products + tensor) / (1 - idle)
        replicas, expert_replicas = layout.dp * layout.cp, layout.dp * layout.cp * layout.tp // layout.ep
        each = config.optim.least_gradient_bytes + 2  # and a parameter
        data = links["data"].seconds(each * self._held.common / (layout.tp * layout.pp) * (1 - 1 / replicas))
        if self._held.experts:
            mean = self._held.experts / (layout.ep * layout.pp)
            data += links["expert_data"].seconds(each * mean * (1 - 1 / expert_replicas))
        return busy + max(0.0, data - 1.5 * (products + tensor) / microbatches)

    def _per_token(self, layout: ChosenLayout, table: PrecisionTable) -> float:
        key = (layout.cp, layout.micro_batch, layout.recompute)
        if key not in self._at_peak:
            self._at_peak[key] = seconds_per_token(
                self.flops, table, Recompute[layout.recompute], self.site.machine.gpu
            )
        return self._at_peak[key]

    @functools.cached_property
    def _held(self) -> HeldElements:
        """Elements of a rank that holds everything."""
        return HeldElements.of(self.config.model, [whole_model(self.config.model)], RankSettings())
