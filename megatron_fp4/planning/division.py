"""How gradients and optimizer state are divided over the replicas of each pipeline rank.

The stages of every pipeline rank are drawn without memory and laid out by the optimizer's own code, so that what is
reported is what a run has. Not here: bytes (memory.py, traffic.py).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from megatron_fp4.comm.mesh import draw_mesh, rank_grid
from megatron_fp4.optim.layout import Bucket, make_buckets
from megatron_fp4.optim.layout_report import layout_report
from megatron_fp4.planning.stand_ins import SizedBackend
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.trainable import draw_stages


def division_section(checked: CheckedConfig, num_gpus: int) -> list[dict[str, Any]]:
    """A `LayoutReport` per pipeline rank, of its first tensor-parallel rank."""
    first_ranks = rank_grid(checked.config.parallel, num_gpus)[:, 0, 0, 0].tolist()
    return [asdict(layout_report(drawn_buckets(checked, num_gpus, rank))) for rank in first_ranks]


def drawn_buckets(checked: CheckedConfig, num_gpus: int, rank: int) -> list[Bucket]:
    """The buckets of a rank's optimizer, on the meta device."""
    config = replace(checked.config, model=checked.config.model.by_torch())
    mesh = draw_mesh(config.parallel, num_gpus, rank)
    backend = SizedBackend(config.precision.backend, on_gpu=True)
    stages = nn.ModuleList(draw_stages(config, backend, mesh, torch.device("meta")))
    return make_buckets(
        stages.named_parameters(),
        mesh.dp_cp,
        bucket_numel=config.optim.bucket_numel,
        sum_replicated_over_tp=mesh.tp.size > 1,
    )
