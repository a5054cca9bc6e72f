"""The planner: memory against counted tensors, schedules, shapes, and the report of the paper's 12B."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_fp4.cli.plan import main
from megatron_fp4.cli.render.plan import render
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.config import DataConfig
from megatron_fp4.data.ramp import BatchRampConfig
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import count_flops
from megatron_fp4.models.decoder import Decoder, Recompute, whole_model
from megatron_fp4.models.partition import split_stages
from megatron_fp4.optim import OptimConfig, Zero1AdamW
from megatron_fp4.pipeline.schedules import SCHEDULES
from megatron_fp4.planning.alignment import alignment_warnings
from megatron_fp4.planning.idle import BUBBLES, PipelineShape, imbalance
from megatron_fp4.planning.memory import MemorySettings, rank_memory, stage_memory
from megatron_fp4.planning.report import run_plan, weight_copy_bytes
from megatron_fp4.planning.traffic import bytes_sent
from megatron_fp4.precision import EmulatedBackend, StepClock, nvfp4_paper
from megatron_fp4.precision.config import BackendName, PrecisionConfig, Rule, Switch
from megatron_fp4.precision.plan import base_table
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import LocalEngine, TokenLoss
from megatron_fp4.train.inputs import Inputs
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.telemetry.peaks import GPUS, flops_by_rate
from tests.helpers.live_memory import LiveBytes
from tests.models.test_count import load

PAPER = PrecisionConfig(
    backend=BackendName.emulated,
    recipes={"nvfp4": nvfp4_paper()},
    rules=[
        Rule(match="head"),
        Rule(blocks="first:2"),
        Rule(blocks="last:8"),
        Rule(use="nvfp4"),
    ],
)


def measured_peak(config: ModelConfig, batch: int, length: int, *, recompute: bool, quantized: bool) -> int:
    """Peak of live bytes over two real steps, state included."""
    clock, mesh = StepClock(0), ParallelMesh.single_process()
    context = LayerContext.of(mesh, EmulatedBackend(), clock, torch.bfloat16, torch.device("cpu"))
    tokens = torch.arange(batch * length).view(batch, length)
    columns = torch.arange(length).expand(batch, -1)
    vocabulary = config.vocab_size
    inputs = Inputs(tokens % vocabulary, (tokens + 1) % vocabulary, tokens, columns, torch.zeros_like(tokens))

    def weights_changed() -> None:
        clock.weights_version += 1

    with LiveBytes() as live:
        mode = Recompute.full if recompute else Recompute.none
        model = Decoder(config, context, whole_model(config), recompute=mode)
        initialize_parameters(model, 0)
        for linear in linears_of(model).values():
            linear.precision = nvfp4_paper() if quantized and linear.name != "head" else linear.precision
        optimizer = Zero1AdamW(model.named_parameters(), OptimConfig(), mesh, True, weights_changed)
        engine = LocalEngine(model, TokenLoss(vocabulary, mesh.tp))
        live.peak = live.now  # how the optimizer sets itself up is not part of a step
        for _ in range(2):
            optimizer.zero_grad()
            engine.train([inputs], 1.0, optimizer.begin_last_microbatch)
            norm = optimizer.finish_grads()
            optimizer.step(norm, lr=1e-4, max_norm=1.0)
    return live.peak


@pytest.mark.parametrize(
    ("name", "batch", "recompute", "quantized"),
    [("hybrid_tiny", 2, False, True), ("hybrid_tiny", 4, True, False), ("gpt_tiny", 4, False, True)],
)
def test_memory_is_within_a_tenth_of_the_counted_peak(name: str, batch: int, recompute: bool, quantized: bool) -> None:
    """A kind of tensor that the formulas forget, or count twice."""
    config = replace(load(name), vocab_size=1024)
    measured = measured_peak(config, batch, 128, recompute=recompute, quantized=quantized)
    copies = {info.name: 2.0 for info in model_linears(config) if quantized and info.name != "head"}
    settings = MemorySettings(
        micro_batch=batch,
        seq_length=128,
        recompute=recompute,
        fused_norm=False,
        emulated=True,
        weight_copies=copies,
    )
    estimate = stage_memory(config, whole_model(config), settings, in_flight=1.0)
    assert sum(estimate.values()) == pytest.approx(measured, rel=0.1)
    state = sum(estimate[kind] for kind in ("weights", "main gradients", "optimizer"))
    assert estimate["activations"] + estimate["working set"] > 0.2 * state  # or the test would only see the state


def test_memory_shrinks_with_the_layout() -> None:
    """tp divides all but norms and whole rows; dp divides the optimizer; recompute leaves the block inputs."""
    config = load("nemotron_h_12b")
    base = MemorySettings()
    whole = stage_memory(config, whole_model(config), base, 1.0)
    halved = stage_memory(config, whole_model(config), replace(base, tp=2), 1.0)
    assert halved["weights"] == pytest.approx(whole["weights"] / 2, rel=1e-3)
    assert whole["activations"] / 2 < halved["activations"] < whole["activations"]
    sharded = stage_memory(config, whole_model(config), replace(base, dp=4, cp=2), 1.0)
    assert sharded["optimizer"] == pytest.approx(whole["optimizer"] / 8)
    recomputed = stage_memory(config, whole_model(config), replace(base, recompute=True), 1.0)
    assert recomputed["activations"] < 0.2 * whole["activations"]
    stages = split_stages(config, 4)
    assert stage_memory(config, whole_model(config), base, 1.0)["buffers"] == 0.0
    middle = stage_memory(config, stages[1], replace(base, num_microbatches=8), 1.0)
    assert middle["buffers"] == 8 * 2 * 8192 * 5120 * 2  # activations from one side, gradients from the other
    loop = rank_memory(config, [stages[0], stages[2]], base, 1.0)
    assert loop["weights"] == sum(stage_memory(config, stages[i], base, 1.0)["weights"] for i in (0, 2))


def test_schedules() -> None:
    """Bubbles by the literature's formulas; and every schedule that the engine has can be planned."""
    assert set(BUBBLES) == set(SCHEDULES)
    assert PipelineShape("1f1b", 4, 12).bubble == pytest.approx(3 / 15)
    assert PipelineShape("interleaved_1f1b", 4, 12, 2).bubble == pytest.approx(3 / 27)
    assert PipelineShape("zbv", 4, 8, 2).bubble == 0.0
    assert all(PipelineShape(name, 1, 7).bubble == 0.0 for name in SCHEDULES)
    assert imbalance([1.0, 1.0, 2.0]) == pytest.approx(1.5)


def test_traffic() -> None:
    """Each axis sends nothing at size 1, and the data axis 6 bytes a parameter (FP32 gradients, BF16 weights)."""
    config = load("gpt_1_2b")
    alone = bytes_sent(config, [whole_model(config)], MemorySettings(), 4)
    assert set(alone.values()) == {0.0}
    data = bytes_sent(config, [whole_model(config)], MemorySettings(dp=2), 4)["data"]
    assert data == pytest.approx(6 * 1.2918e9 / 2, rel=1e-3)
    tensor = bytes_sent(config, [whole_model(config)], MemorySettings(tp=2), 1)["tensor"]
    assert tensor == (20 * 2 * 4 + 4) * 8192 * 2048 * 2 / 2 + 8192 * 28 + 41 * 2048 * 4  # rows, loss, norm weights


def test_traffic_of_a_pipeline() -> None:
    """Activations cross what lies between ranks, and nothing else: not the point of a V, not the ends of the model."""
    config = load("gpt_1_2b")
    stages, row_bytes = split_stages(config, 4), 8192 * 2048 * 2

    def sent(*numbers: int) -> float:
        return bytes_sent(config, [stages[number] for number in numbers], MemorySettings(), 3)["pipeline"]

    assert sent(0) == sent(3) == 3 * row_bytes  # one neighbour: activations or gradients
    assert sent(1) == 2 * 3 * row_bytes
    assert sent(0, 2) == sent(1, 3) == 3 * 3 * row_bytes  # looped: every border lies between ranks
    assert sent(0, 3) == 2 * 3 * row_bytes  # outer rank of a V
    assert sent(1, 2) == 2 * 3 * row_bytes  # at the point of the V: 1 -> 2 stays here


def test_alignment_of_the_12b_at_tp_8() -> None:
    """22656 / 8 = 177 * 16: Transformer Engine cannot contract it; at tp 4 it can, outside the fast path."""
    linears = model_linears(load("nemotron_h_12b"))
    table = base_table(PAPER, linears)
    by_tp = {tp: alignment_warnings(linears, table, tp=tp, tokens=8192) for tp in (1, 4, 8)}
    assert by_tp[1] == []
    assert [(w["severity"], "5664" in w["text"]) for w in by_tp[4]] == [("slow", True)]
    assert [(w["severity"], "2832" in w["text"]) for w in by_tp[8]] == [("error", True)]
    assert "22656 / tp 8" in by_tp[8][0]["text"]
    assert "dgrad" in by_tp[8][0]["text"]
    odd_tokens = alignment_warnings(linears, table, tp=1, tokens=8200)
    assert {w["severity"] for w in odd_tokens} == {"error"}


def test_weight_copies() -> None:
    """2-D tiles need one dequantized copy, 1-D tiles two; Transformer Engine keeps both directions, packed."""
    te = replace(PAPER, backend=BackendName.transformer_engine)
    assert weight_copy_bytes(nvfp4_paper(), PAPER, 2) == 2.0
    assert weight_copy_bytes(nvfp4_paper(square_weights=False), PAPER, 2) == 4.0
    assert weight_copy_bytes(nvfp4_paper(), te, 2) == 1.125


def twelve_billion(**parallel: int) -> RunConfig:
    return RunConfig(
        model=load("nemotron_h_12b"),
        precision=PAPER,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(seq_length=8192),
        train=TrainConfig(global_batch=736, total_tokens=1e13),
        optim=OptimConfig(),
    )


def test_plan_of_the_12b() -> None:
    report = run_plan(twelve_billion(tp=8, pp=2), num_gpus=1472, gpu="GB200", efficiency=0.4)
    assert report["run"]["dp"] == 92
    assert report["run"]["tokens_per_step"] == 6_029_312
    assert report["parameters"]["total"] == 12_310_001_152
    assert report["parameters"]["quantized"] / 1e9 == pytest.approx(9.07, abs=0.01)
    time = report["time"]
    assert time["step_seconds"] > time["step_seconds_at_peak"]
    assert 1.0 < time["speed_up_over_bf16"] < time["speed_up_limit"]
    share = report["precision"][0]["quantized_share_of_flops"]
    assert time["speed_up_over_bf16"] == pytest.approx(1 / (1 - share + share / 4))  # Amdahl, FP4 = 4 x BF16
    assert len(report["memory_per_rank"]["pipeline_ranks"]) == 2
    text = render(report)
    assert "12,310,001,152" in text
    assert "22656 / tp 8" in text
    assert json.loads(json.dumps(report))["run"]["gpus"] == 1472


def test_gpus_without_fp4_are_not_faster() -> None:
    report = run_plan(twelve_billion(tp=8), num_gpus=8 * 46, gpu="H100")
    assert report["time"]["speed_up_over_bf16"] == pytest.approx(1.0)
    assert "no FP4 unit" in render(report)


def test_time_follows_the_phases() -> None:
    """A forward switch to BF16 at 82% costs what its GEMMs cost at the slower rate, for the rest of the run only."""
    config = twelve_billion(tp=8)
    plain = run_plan(config, num_gpus=8 * 92)
    switch = Switch(at_fraction=0.82, gemms=["fprop"])
    switched = run_plan(replace(config, precision=replace(PAPER, switch=[switch])), num_gpus=8 * 92)
    assert len(switched["precision"]) == 2
    assert switched["time"]["step_seconds"] == plain["time"]["step_seconds"]
    share = plain["precision"][0]["quantized_share_of_flops"]
    slower = share / 3 * (1 - 1 / 4) * plain["time"]["speed_up_over_bf16"]  # relative to a plain step
    assert switched["time"]["days"] / plain["time"]["days"] == pytest.approx(1 + 0.18 * slower, rel=0.02)
    recomputed = run_plan(replace(config, train=replace(config.train, recompute=Recompute.full)), num_gpus=8 * 92)
    assert 1.25 < recomputed["time"]["step_seconds"] / plain["time"]["step_seconds"] < 1.34


def test_a_batch_ramp_is_planned() -> None:
    """Small steps have fewer microbatches, so more of their time is idle; the steps and tokens are those of the run."""
    config = twelve_billion(tp=8, pp=2)
    ramp = BatchRampConfig(start_samples=184, increment_samples=184, ramp_samples=600_000_000)
    ramped = replace(config, train=replace(config.train, batch_ramp=ramp))
    plain, report = (run_plan(one, num_gpus=1472) for one in (config, ramped))
    assert plain["batch_ramp"] == []
    assert [stage["samples"] for stage in report["batch_ramp"]] == [184, 368, 552, 736]
    assert [stage["microbatches"] for stage in report["batch_ramp"]] == [2, 4, 6, 8]
    assert [round(stage["bubble"], 3) for stage in report["batch_ramp"]] == [0.333, 0.2, 0.143, 0.111]
    assert report["batch_ramp"][1]["from_tokens"] == 8192 * 200_000_000 + 8192 * (-200_000_000 % 184)
    assert report["run"]["steps"] == sum(stage["steps"] for stage in report["batch_ramp"]) == ramped.total_steps
    assert report["time"]["step_seconds"] == plain["time"]["step_seconds"], "of the last stage"
    idle = [(1 - 1 / 9) / (1 - stage["bubble"]) for stage in report["batch_ramp"]]
    parts = [stage["steps"] * stage["samples"] for stage in report["batch_ramp"]]
    mean = sum(part * factor for part, factor in zip(parts, idle, strict=True)) / sum(parts)
    assert report["time"]["days"] / plain["time"]["days"] == pytest.approx(mean, rel=1e-3)
    assert "steps of 368 samples, 4 microbatch(es), idle 20.0%" in render(report)


def test_flops_by_rate_add_up() -> None:
    config = load("nemotron_h_12b")
    flops = count_flops(config, 8192)
    rates = flops_by_rate(flops, base_table(PAPER, model_linears(config)))
    assert sum(rates.values()) == pytest.approx(flops.training)
    assert GPUS["GB200"].rate("fp4") == 4 * GPUS["GB200"].rate("bf16")  # table 1 of the paper
    assert GPUS["GB300"].rate("fp4") == 6 * GPUS["GB300"].rate("bf16")


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"tp \* pp \* cp \* dp"):
        run_plan(twelve_billion(tp=8, pp=2), num_gpus=100)
    with pytest.raises(ValueError, match="known: H100"):
        run_plan(twelve_billion(), gpu="GB2OO")


@pytest.mark.parametrize(("schedule", "order", "formula"), [("zbv", 3 / 51, 0.0), ("dualpipev", 1 / 9, 1 / 9)])
def test_idle_time_is_that_of_the_order(schedule: str, order: float, formula: float) -> None:
    """The papers' formula for ZB-V is not that of the order that torch runs."""
    config = replace(twelve_billion(tp=4, pp=4), parallel=ParallelConfig(tp=4, pp=4, schedule=schedule))
    section = run_plan(config, num_gpus=16 * 92)["pipeline"]
    assert section["bubble"] == pytest.approx(order)
    assert section["bubble_by_formula"] == pytest.approx(formula)
    assert "timeline" not in section, "thousands of entries in a report that did not ask for them"


PIPELINE = ["model=gpt_tiny", "model.vocab_size=1024", "data.seq_length=256", "train.micro_batch=1"]


def test_drawn_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """1F1B by hand: a cell in the wrong slot, or microbatches numbered from 1 on the last stage."""
    overrides = [*PIPELINE, "train.global_batch=3", "parallel.pp=2", "--schedule"]
    assert main(overrides) == 0
    text = capsys.readouterr().out
    assert "  rank 0 stage 0 F0 F1 .  .  B0 -- F2 B1 -- .  B2 --\n" in text
    assert "  rank 1 stage 1 .  F0 B0 -- F1 B1 -- F2 B2 -- .  .\n" in text
    assert "idle 25.0% by the order of actions; 25.0% by the formula (p - 1) / (m + p - 1)" in text
    assert "F forward; B -- backward; . idle" in text
    assert main([*overrides, "--json"]) == 0
    timeline = json.loads(capsys.readouterr().out)["pipeline"]["timeline"]
    assert timeline[1][0] == {"kind": "F", "stage": 1, "microbatch": 0, "units": 1, "begin": 1, "end": 2}
    assert main([*PIPELINE, "--schedule"]) == 2
    assert "no effect with parallel.pp = 1" in capsys.readouterr().err


def test_wide_schedule_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Letters for the stages of a rank; lines as long as a page, and the note that there is more."""
    assert main([*PIPELINE, "train.global_batch=8", "parallel.pp=2", "parallel.schedule=zbv", "--schedule"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("  rank ")]
    assert [row[:18] for row in rows] == ["  rank 0 a=0 b=3 F", "  rank 1 a=1 b=2 ."]
    assert all(len(row) <= 120 for row in rows)
    assert any(line.startswith("  slots 1 to 25 of 49;") for line in lines)
    assert any("W: of weights" in line for line in lines)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=hybrid_tiny", "model.vocab_size=1024", "data.seq_length=256", "train.global_batch=8"]
    assert main([*overrides, "--json", "--gpus", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["dp"] == 2
    assert main([*overrides, "--gpu", "B200"]) == 0
    assert "Memory per rank" in capsys.readouterr().out
    assert main([*overrides, "--gpus", "three"]) == 2
    assert main(["model=hybrid_tinny"]) == 2
    assert "did you mean 'hybrid_tiny'" in capsys.readouterr().err
