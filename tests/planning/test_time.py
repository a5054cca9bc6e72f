"""Time with traffic: by hand for six layouts, the terms one by one, and which links an axis crosses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.comm.config import Overlap, ParallelConfig
from megatron_fp4.models.block import MIXERS
from megatron_fp4.models.decoder import StageRange
from megatron_fp4.optim.config import QkClipConfig
from megatron_fp4.optim.kept.choice import conversion_bytes
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat, MomentsConfig
from megatron_fp4.planning.cost.hardware import Assumptions
from megatron_fp4.planning.cost.links import paths
from megatron_fp4.planning.cost.machines import MACHINES
from megatron_fp4.planning.cost.overheads import UPDATE_BYTES, Overheads
from megatron_fp4.planning.cost.time import KINDS
from megatron_fp4.planning.report import run_plan
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable, Row
from megatron_fp4.train.config import RunConfig
from tests.models.test_count import load
from tests.planning.test_report import twelve_billion

SIX = {  # tp, pp, schedule, global batch -> days by hand (docs/planning.md): all traffic hidden, none
    (8, 4, "interleaved_zero_bubble", 768): (1.7, 2.7),
    (4, 2, "1f1b", 1536): (1.8, 3.3),
    (8, 2, "zbv", 768): (1.8, 3.3),
    (2, 4, "interleaved_zero_bubble", 1536): (2.0, 3.4),
    (2, 2, "1f1b", 2048): (2.7, 4.1),
    (4, 1, "1f1b", 1024): (5.1, 6.2),
}


def twelve(tp: int, pp: int, schedule: str, global_batch: int) -> RunConfig:
    config = twelve_billion()
    parallel = ParallelConfig(tp=tp, pp=pp, schedule=schedule)
    return replace(config, parallel=parallel, train=replace(config.train, global_batch=global_batch))


def test_layouts_come_in_the_order_that_their_bytes_demand() -> None:
    """FLOPs at 40 % of peak, and bytes over 900 and 50 GB/s: tp 4 alone has the least of everything but gradients."""
    times = [run_plan(twelve(*layout), 4096)["time"] for layout in SIX]
    for time, (hidden, exposed) in zip(times, SIX.values(), strict=True):
        assert round(time["days"]["hidden"], 1) == hidden
        assert round(time["days"]["exposed"], 1) == exposed
    expected = [round(time["days"]["expected"], 1) for time in times]
    assert expected == sorted(expected)
    assert times[-1]["dominating"] == "data"


def test_a_bytes_by_hand() -> None:
    """tp 4, batch 1024: gradients and parameters of 12.31 B / 4, 6 bytes each, over 50 GB/s, 1,192,092 times."""
    config = twelve(4, 1, "1f1b", 1024)
    time = run_plan(config, 4096)["time"]
    assert time["terms"]["data"] == pytest.approx(12.31e9 / 4 * 6 * 1023 / 1024 / 50e9, rel=1e-3)
    assert time["terms"]["data"] * config.total_steps / 86400 == pytest.approx(5.09, abs=0.01)
    assert time["terms"]["tensor"] == pytest.approx(15.86e9 / 900e9, rel=1e-3)
    assert sum(time["terms"].values()) == pytest.approx(time["step_seconds"]["worst"])
    steps = time["step_seconds"]
    assert steps["hidden"] < steps["expected"] < steps["worst"]
    assert steps["hidden"] < steps["exposed"] < steps["worst"]
    assert set(steps) == set(KINDS)


def test_what_may_not_overlap_is_waited_for() -> None:
    config = twelve(4, 2, "1f1b", 1536)
    never = replace(config, optim=replace(config.optim, overlap_reduce=Overlap.never, overlap_gather=Overlap.never))
    beside, after = (run_plan(one, 4096)["time"] for one in (config, never))
    assert beside["terms"] == after["terms"]
    late = after["terms"]["data"] + after["terms"]["data_latency"]
    assert after["step_seconds"]["expected"] == pytest.approx(
        after["step_seconds"]["worst"] - after["terms"]["pipeline"]
    )
    assert 0 < after["step_seconds"]["expected"] - beside["step_seconds"]["expected"] < late


def test_links() -> None:
    """A group that fits a domain stays inside; what leaves it has one network link a rank, or those of several."""
    h100, gb200 = MACHINES["H100"], MACHINES["GB200"]
    parallel = ParallelConfig(tp=4, cp=2, pp=2)
    small = paths(parallel, 16, h100)
    assert {axis: path.crosses for axis, path in small.items()} == {
        "tensor": False,
        "context": False,
        "data": True,
        "pipeline": True,
        "amax": False,
    }
    assert small["data"].inside == 2
    assert small["data"].bytes_per_second == 50e9
    assert paths(parallel, 16, h100, rails=8)["data"].bytes_per_second == 100e9, "only two of its ranks are in a server"
    assert paths(ParallelConfig(), 4096, gb200, rails=72)["data"].bytes_per_second == 900e9, "no faster than NVLink"
    large = paths(parallel, 8, gb200)
    assert not large["data"].crosses, "64 ranks of a rack of 72"
    assert large["data"].bytes_per_second == 900e9
    assert paths(ParallelConfig(tp=16), 2, h100)["tensor"].crosses


def test_what_more_network_links_would_gain_is_said() -> None:
    """By one link a rank the gradients of tp 4 alone decide; by all of a rack's the order of layouts is another."""
    config = twelve(4, 1, "1f1b", 1024)
    time = run_plan(config, 4096)["time"]
    by_all = run_plan(config, 4096, assumptions=Assumptions(rails=18.0))["time"]
    assert time["links"]["data"]["gb_per_second"] == 50
    assert time["links"]["data"]["gb_per_second_by_all_links"] == by_all["links"]["data"]["gb_per_second"] == 900
    assert time["expected_days_by_all_links"] == by_all["days"]["expected"] < 0.3 * time["days"]["expected"]


def test_latency_by_hand() -> None:
    """Eight ranks of a domain: seven steps of a ring; 64 ranks one a server: six levels of a tree, up and down."""
    tensor = paths(ParallelConfig(tp=8), 64, MACHINES["H100"])
    assert tensor["tensor"].latency == pytest.approx(8.4e-6 + 7 * 3.4e-6)
    assert tensor["data"].latency == pytest.approx(8.4e-6 + 6 * 9.6e-6)
    assert tensor["tensor"].small_latency == pytest.approx(4.4e-6 + 2 * 7 * 0.52e-6)
    assert tensor["data"].small_latency == pytest.approx(4.4e-6 + 2 * 6 * 5.0e-6)
    assert paths(ParallelConfig(), 1, MACHINES["H100"])["data"].latency == 0.0


def test_quantizers_and_optimizer_by_hand() -> None:
    """Of one MLP block: its inputs and output gradients read twice, written twice as 4.5-bit codes."""
    config = replace(load("hybrid_tiny"), pattern="-", num_layers=1, vocab_size=1024)
    names = ["blocks.0.mlp.up", "blocks.0.mlp.down"]
    rows = [Row(name, nvfp4_paper(), "") for name in names] + [Row("head", LinearPrecision(), "")]
    settings = RankSettings(tp=2, dp=4, seq_length=128, table=PrecisionTable(tuple(rows)))
    assert MIXERS["-"] == ("mlp",)
    one = Overheads.of(config, [StageRange(0, 1, 1)], settings)
    wide, narrow = config.ffn_hidden // 2, config.hidden
    elements = 128 * (narrow + wide) + 128 * (wide + narrow)  # x and dy of up; x and dy of down
    assert one.quantizer_bytes == elements * (2 + 2 + 2 * 0.5625)
    assert one.weight_bytes == 2 * wide * narrow * (2 + 2 + 2 * 0.5625)
    assert (one.scale_reductions, one.weight_reductions) == (4, 2)
    parameters = 2 * wide * narrow + 2 * narrow + 2 * 512 * narrow
    assert one.optimizer_bytes == parameters * (4 + UPDATE_BYTES / 4)


def test_assumptions_are_replaced_by_name() -> None:
    assumptions = Assumptions.of(["network_gb_per_second=100", "domain_gpus=8", "efficiency=0.5"])
    machine = assumptions.machine("GB200")
    assert (machine.network_gb_per_second, machine.domain_gpus, machine.inner_gb_per_second) == (100.0, 8, 900.0)
    slow, fast = (
        run_plan(twelve(4, 1, "1f1b", 1024), 4096, assumptions=one)["time"] for one in (Assumptions(), assumptions)
    )
    assert fast["terms"]["data"] == slow["terms"]["data"] / 2
    assert fast["terms"]["products"] == pytest.approx(slow["terms"]["products"] * 0.4 / 0.5)
    for text, message in (
        ("netwrk_gb_per_second=1", "did you mean 'network_gb_per_second'"),
        ("rails=many", "not a number"),
        ("rails=0.5", "whole numbers from 1"),
        ("efficiency=1.2", "at most 1"),
        ("storage_gb_per_second=0", "from 1e-06"),
        ("kilowatts=nan", "or 0"),
        ("tokens_per_document=1e-300", "from 1e-06 to 1e\\+12"),
        ("network_gb_per_second=-1", "or 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Assumptions.of([text])
    assert {name for name, machine in MACHINES.items() if not machine.sources} == set()


def test_qk_clip_and_compact_moments_cost_their_passes() -> None:
    config = twelve(4, 1, "1f1b", 1024)
    clipping = replace(config, optim=replace(config.optim, qk_clip=QkClipConfig(100.0)))
    fp8 = replace(
        config.optim, master=MasterFormat.remainder, moments=MomentsConfig(MomentFormat.fp8, MomentFormat.fp8)
    )
    terms, clipped, compact = (
        run_plan(each, 4096)["time"]["terms"] for each in (config, clipping, replace(config, optim=fp8))
    )
    assert terms["qk_clip"] == 0.0
    assert 0.005 < clipped["qk_clip"] / terms["products"] < 0.2, "its logits are written and read in FP32"
    assert compact["optimizer"] > terms["optimizer"]
    each = {optim: conversion_bytes(optim, muon=False, dtype=torch.bfloat16) for optim in (config.optim, fp8)}
    assert each == {config.optim: 0, fp8: 46 + 2 * (16 + 2 * (1 + 1 / 64))}
