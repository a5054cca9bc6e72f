"""The optimizer's layout of the paper's models, drawn at 1 to 8,192 ranks: little padding, equal shares, none empty."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from megatron_fp4.cli.render.plan import render
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import DrawnGroup, draw_mesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.layers.fused.norm import NormImpl
from megatron_fp4.layers.mamba.kernels import MambaKernel
from megatron_fp4.optim.layout import make_buckets
from megatron_fp4.optim.layout_report import layout_report
from megatron_fp4.planning.report import run_plan
from megatron_fp4.planning.stand_ins import SizedBackend
from megatron_fp4.precision.config import BackendName
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.trainable import draw_stages
from tests.models.test_count import load
from tests.planning.test_report import twelve_billion

SIZES = (1, 2, 3, 5, 8, 23, 64, 92, 184, 384, 736, 1000, 2944, 4096, 8191, 8192)


def drawn_group(size: int) -> DrawnGroup:
    return DrawnGroup("dp_cp", tuple(range(size)), 0)


@pytest.mark.parametrize(
    ("model", "tp", "pp"),
    [
        ("nemotron_h_12b", 1, 1),
        ("nemotron_h_12b", 4, 1),
        ("nemotron_h_12b", 8, 4),
        ("nemotron_h_8b", 1, 1),
        ("gpt_1_2b", 2, 1),
    ],
)
def test_every_rank_of_the_papers_models_owns_its_share(model: str, tp: int, pp: int) -> None:
    config = RunConfig(model=load(model), parallel=ParallelConfig(tp=tp, pp=pp, dp=1))
    backend, mesh = (
        SizedBackend(BackendName.emulated, on_gpu=True),
        draw_mesh(config.parallel, tp * pp, rank=tp * pp - 1),
    )
    stages = nn.ModuleList(draw_stages(config, backend, mesh, torch.device("meta")))
    for size in SIZES:
        buckets = make_buckets(
            stages.named_parameters(),
            drawn_group(size),
            bucket_numel=config.optim.bucket_numel,
            sum_replicated_over_tp=tp > 1,
        )
        report = layout_report(buckets)
        assert report.elements == sum(parameter.numel() for parameter in stages.parameters())
        assert report.empty_ranks == 0, f"{size}: {report}"
        assert report.padding < 2e-6 * size + 1e-5, f"{size}: {report}"
        assert report.imbalance < 1 + 2e-6 * size + 1e-5, f"{size}: {report}"


def test_report_of_a_layout_with_empty_ranks() -> None:
    """Buckets of 2 and of 1 part of 64 elements over four ranks, the second bucket's gap before its parameter."""
    shapes = {"a": (64,), "b": (2, 60)}
    named = [(name, LogicalParameter.whole(name, torch.zeros(shape))) for name, shape in shapes.items()]
    report = layout_report(make_buckets(named, drawn_group(4), bucket_numel=1, sum_replicated_over_tp=False))
    assert (report.num_buckets, report.elements, report.part_numel) == (2, 184, 64)
    assert report.empty_ranks == 1, "rank 2; b lies on ranks 0 and 1, a on rank 3"
    assert report.padding == pytest.approx(512 / 184 - 1)
    assert report.imbalance == pytest.approx(64 / (184 / 4))


def test_a_plan_says_how_optimizer_state_is_divided() -> None:
    """With whole rows 16 of these 736 ranks owned nothing."""
    report = run_plan(twelve_billion(tp=4), num_gpus=2944)
    (entry,) = report["division"]
    assert entry["empty_ranks"] == 0
    assert "divided over 736 ranks" in render(report)
    assert "0 ranks own nothing" in render(report)


def test_kernels_that_this_machine_lacks_change_no_division() -> None:
    """A plan for a cluster is made on a laptop."""
    config = twelve_billion(tp=4)
    fused = replace(config, model=replace(config.model, norm_impl=NormImpl.apex, mamba_kernel=MambaKernel.mamba_ssm))
    assert run_plan(fused, num_gpus=2944)["division"] == run_plan(config, num_gpus=2944)["division"]
