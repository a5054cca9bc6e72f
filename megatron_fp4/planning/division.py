"""How gradients and optimizer state are divided over the replicas of each pipeline rank.

The stages of every pipeline rank are drawn without memory and laid out by the optimizer's own code, so that what is
reported is what a run has. Not here: bytes (memory.py, traffic.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from megatron_fp4.comm.mesh import draw_mesh, rank_grid
from megatron_fp4.optim.buckets import buckets_for
from megatron_fp4.optim.layout import Bucket
from megatron_fp4.optim.layout_report import layout_report
from megatron_fp4.optim.muon.exchange import busiest
from megatron_fp4.planning.stand_ins import SizedBackend
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.trainable import draw_stages


def division_section(checked: CheckedConfig, num_gpus: int) -> list[dict[str, Any]]:
    """A `LayoutReport` per pipeline rank, of its first tensor-parallel rank; with Muon the load of its owners.

    "experts": the same of the experts on that rank, which other ranks share; None without.
    """
    first_ranks = rank_grid(checked.config.parallel, num_gpus)[:, 0, 0, 0].tolist()
    entries = []
    for rank in first_ranks:
        buckets = drawn_buckets(checked, num_gpus, rank)
        of_experts = [bucket for bucket in buckets if bucket.slots[0].placement.of_experts]
        entry = _entry(checked, [bucket for bucket in buckets if bucket not in of_experts], checked.config.parallel.tp)
        entries.append(entry | {"experts": _entry(checked, of_experts, 1) if of_experts else None})
    return entries


def _entry(checked: CheckedConfig, buckets: Sequence[Bucket], copies: int) -> dict[str, Any]:
    muon = _muon_load(checked, buckets, buckets[0].num_parts * copies)
    return asdict(layout_report(buckets)) | {"ranks": buckets[0].num_parts, "muon": muon}


def _muon_load(checked: CheckedConfig, buckets: Sequence[Bucket], ranks: int) -> dict[str, Any] | None:
    """How matrices divide over the ranks that share them; None where Muon has none."""
    config = checked.config
    rectangles = [
        where
        for bucket in buckets
        if bucket.kind.matrices
        for slot in bucket.slots
        for where in slot.placement.rectangles
    ]
    shapes = {where.name: (where.global_shape[0], where.global_shape[1]) for where in rectangles}
    load = busiest(shapes, ranks, len(config.optim.muon.newton_schulz.triples)) if shapes else None
    return load and {"matrices": len(shapes), "ranks": ranks, **load._asdict()}


def drawn_buckets(checked: CheckedConfig, num_gpus: int, rank: int) -> list[Bucket]:
    """The buckets of a rank's optimizer, on the meta device."""
    config = replace(checked.config, model=checked.config.model.by_torch())
    mesh = draw_mesh(config.parallel, num_gpus, rank)
    backend = SizedBackend(config.precision.backend, on_gpu=True)
    stages = nn.ModuleList(draw_stages(config, backend, mesh, torch.device("meta")))
    trained = ((name, parameter) for name, parameter in stages.named_parameters() if parameter.requires_grad)
    return buckets_for(trained, config.optim, mesh, sum_replicated_over_tp=mesh.tp.size > 1)
