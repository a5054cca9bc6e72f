"""Plans of models with experts: rows, padding, bytes and time, against other counts and against published speeds."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.models.count import count_flops, held_parameters
from megatron_fp4.models.decoder import whole_model
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.planning.cost.experts import padding_share
from megatron_fp4.planning.cost.hardware import Assumptions, Site
from megatron_fp4.planning.cost.links import paths
from megatron_fp4.planning.cost.machines import MACHINES
from megatron_fp4.planning.cost.time import StepTime, step_time
from megatron_fp4.planning.held import HeldElements, stage_linears
from megatron_fp4.planning.idle import PipelineLayout
from megatron_fp4.planning.memory import least_memory, rank_memory
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.traffic import bytes_sent
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig

BENCHMARK = ["parallel.tp=2", "parallel.ep=64", "train.global_batch=512", "precision.backend=transformer_engine"]
"""NVIDIA's own on 64 GB200 (Megatron-Bridge, perf_recipes/nemotronh)."""
EVERYWHERE = ["precision.use=mxfp8", "precision.keep_bf16.last=0", "precision.rules=[{match:'mtp.*',use:bf16}]"]
"""What is MXFP8 there: all linears but the head and those of multi-token prediction."""


@functools.cache
def super_run(*overrides: str) -> RunConfig:
    run = to_run_config(compose_config(["experiment=nemotron3_super", "data.tokenizer=", *overrides]))
    return check_config(run, 64).config


def settings_of(*overrides: str) -> RankSettings:
    checked = check_config(super_run(*overrides), 64)
    return RankSettings.of(checked, checked.plan.table())


@pytest.mark.parametrize(("tokens", "percent"), [(8192, 2.1), (4096, 4.3), (2048, 8.5)])
def test_padding(tokens: int, percent: float) -> None:
    """Against drawn choices: 22 of 512 experts, each segment extended to 16 rows."""
    settings = replace(settings_of(*BENCHMARK), seq_length=tokens)
    model = super_run().model
    draw = torch.Generator().manual_seed(tokens)
    counts = torch.rand(tokens, 512, generator=draw).topk(22, dim=1).indices.flatten().bincount(minlength=512)
    drawn = ((counts + 15) // 16 * 16).sum() / counts.sum() - 1
    assert padding_share(model, settings) == pytest.approx(float(drawn), rel=0.1)
    assert round(100 * padding_share(model, settings), 1) == percent
    longer = replace(settings, seq_length=8 * tokens)
    chunks = replace(model, moe=replace(model.moe, segment_tokens=tokens))
    assert padding_share(chunks, longer) == pytest.approx(percent / 100, rel=0.02), "chunks pad as microbatches do"


def test_a_rank_holds_its_experts_and_their_state() -> None:
    """Experts are divided by ep, and their state over the ranks that hold the same ones; the rest as ever."""
    model, settings = super_run().model, RankSettings(tp=2, dp=32, ep=16)
    stages = [whole_model(model)]
    alone, held = (HeldElements.of(model, stages, one) for one in (RankSettings(), settings))
    assert alone.total == sum(parameter.numel for parameter in held_parameters(model, stages))
    mixtures = 40 + 1  # one of multi-token prediction, whose weights both depths share
    assert alone.experts == mixtures * 512 * 2 * 1024 * 2688
    assert held.experts == alone.experts / 16
    assert held.common - held.replicated == (alone.common - alone.replicated) / 2
    assert held.divided(settings) == held.common / 32 + held.experts / 4
    assert sum(info.numel for info in stage_linears(model, stages[0]) if info.num_experts) == alone.experts


def test_a_bias_is_four_bytes() -> None:
    """Its own, whatever the compute dtype: no copy for the optimizer, no moments, no gradient."""
    config, settings = super_run(), RankSettings(tp=2, dp=32, ep=16)
    model = config.model
    without = replace(model, moe=replace(model.moe, expert_bias=False, bias_rate=0.0))
    pipeline = PipelineLayout.of(config, 1)
    biased, plain = (least_memory(one, pipeline, settings) for one in (model, without))
    assert biased - plain == pytest.approx(4 * 512 * (40 + 1), abs=1)


def test_bytes_of_the_exchange() -> None:
    """By hand: each of 22 copies goes in BF16 with FP32 weight and int64 address, comes back, and twice so backward."""
    model = super_run().model
    sent = bytes_sent(model, [whole_model(model)], RankSettings(tp=2, dp=32, ep=64, num_microbatches=3))
    copies, mixtures = 4096 * 22, 40 + 2
    row = 1024 * 2
    assert sent["experts"] == 3 * mixtures * copies * ((row + 12) + row + row + (row + 4)) * 63 / 64
    assert sent["expert_data"] == 0.0, "one rank of 64 holds an expert: nothing to sum"
    halves = bytes_sent(model, [whole_model(model)], RankSettings(tp=2, dp=32, ep=32))
    assert halves["expert_data"] == 41 * 16 * 2 * 1024 * 2688 * 6 / 2
    assert bytes_sent(model, [whole_model(model)], RankSettings(tp=2, dp=32))["experts"] == 0.0


def test_links_of_experts() -> None:
    """Rows leave a domain only for the experts that are outside of it."""
    links = paths(ParallelConfig(tp=2, ep=64), 64, MACHINES["GB200"], with_experts=True)
    assert (links["experts"].inside, links["experts"].crosses) == (64, False)
    assert (links["expert_data"].size, links["expert_data"].crosses) == (2, True)
    far = paths(ParallelConfig(tp=2, ep=128), 64, MACHINES["GB200"], with_experts=True)["experts"]
    assert far.exchange_seconds(50e9) == pytest.approx((128 - 72) / 127)


def time_of(gpu: str, *overrides: str) -> StepTime:
    config, settings = super_run(*BENCHMARK, *overrides), settings_of(*BENCHMARK, *overrides)
    assumptions = Assumptions()
    site = Site(assumptions.machine(gpu), assumptions, 64)
    pipeline = PipelineLayout.of(config, settings.num_microbatches)
    return step_time(config, count_flops(config.model, 8192), pipeline, settings, 0.0, site)


@pytest.mark.parametrize(("gpu", "published"), [("GB200", 7168 / 7040), ("GB300", 10240 / 9856)])
def test_nvfp4_gains_little(gpu: str, published: float) -> None:
    """Over MXFP8 as published, which is nearly everywhere, hardly anything; of the same products a tenth.

    Megatron-Bridge's summary 26.08. Nothing of it set an assumption. A dense 405B: test_truth_table.py.
    """
    nvfp4 = time_of(gpu).expected
    assert time_of(gpu, *EVERYWHERE).expected / nvfp4 == pytest.approx(published, rel=0.03)
    assert 1.05 < time_of(gpu, "precision.use=mxfp8").expected / nvfp4 < 1.15


def test_assumptions_of_experts() -> None:
    """Slower grouped products and more padding cost time; a dense model has none of the three terms."""
    config, settings = super_run(*BENCHMARK), settings_of(*BENCHMARK)
    pipeline = PipelineLayout.of(config, settings.num_microbatches)
    flops = count_flops(config.model, 8192)

    def terms(settings: RankSettings, **assumed: float) -> dict[str, float]:
        assumptions = Assumptions(**assumed)
        site = Site(assumptions.machine("GB200"), assumptions, 64)
        return step_time(config, flops, pipeline, settings, 0.0, site).terms

    fast, slow = terms(settings, grouped_share=1.0), terms(settings, grouped_share=0.5)
    assert fast["grouped"] > 0, "padding"
    assert slow["grouped"] > 20 * fast["grouped"]
    assert fast["router"] == 3 * flops.router * 512 * 8192 / 64 / 75e12
    assert {name for name in fast if fast[name] != slow[name]} == {"grouped"}
    assert count_flops(config.model.with_blocks("M*", MtpConfig()), 8192).router == 0


def test_memory() -> None:
    """Weights, gradients and state by hand; activations are those of rows that are the same for all experts."""
    config, settings = super_run(*BENCHMARK), settings_of(*BENCHMARK)
    pipeline = PipelineLayout.of(config, settings.num_microbatches)
    (stages,) = pipeline.chunks
    memory = rank_memory(config.model, stages, settings, pipeline.order[0])
    held = HeldElements.of(config.model, stages.values(), settings)
    assert memory["main gradients"] == 4 * held.trained == 2 * (memory["weights"] - 4 * held.untrained)
    assert memory["optimizer"] == 12 * (held.common / 32 + held.experts)
    assert 50e9 < memory["activations"] < 300e9
