"""Planned memory against the most that is alive in real training steps on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.data.config import DataConfig
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Decoder, Recompute, whole_model
from megatron_fp4.models.partition import split_stages
from megatron_fp4.optim import OptimConfig, Zero1Optimizer
from megatron_fp4.pipeline.order import Work, pipeline_order
from megatron_fp4.pipeline.schedules import schedule_rule, stages_of_rank, stages_per_rank
from megatron_fp4.planning.footprint import LiveBytes
from megatron_fp4.planning.memory import ONE_MICROBATCH, rank_memory, stage_memory, weight_copy_bytes
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision import EmulatedBackend, LinearPrecision, StepClock, nvfp4_paper
from megatron_fp4.precision.config import BackendName
from megatron_fp4.precision.table import PrecisionTable, Row
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import LocalEngine, TokenLoss
from megatron_fp4.train.inputs import Inputs
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.trainable import build_trainable
from tests.models.test_count import load


def table_of(config: ModelConfig, *, quantized: bool) -> PrecisionTable:
    """The paper's recipe on all linears but the head, or on none."""
    names = [info.name for info in model_linears(config)]
    recipe = nvfp4_paper() if quantized else LinearPrecision()
    return PrecisionTable(tuple(Row(name, recipe if name != "head" else LinearPrecision(), "") for name in names))


def measured_peak(config: ModelConfig, batch: int, length: int, *, recompute: Recompute, quantized: bool) -> int:
    """Peak of live bytes over two real steps, state included."""
    clock, mesh = StepClock(0), ParallelMesh.single_process()
    context = LayerContext.of(mesh, EmulatedBackend(), clock, torch.bfloat16, torch.device("cpu"))
    tokens = torch.arange(batch * length).view(batch, length)
    columns = torch.arange(length).expand(batch, -1)
    vocabulary = config.vocab_size
    inputs = Inputs(tokens % vocabulary, (tokens + 1) % vocabulary, tokens, columns, torch.zeros_like(tokens))
    table = table_of(config, quantized=quantized)

    def weights_changed() -> None:
        clock.weights_version += 1

    with LiveBytes() as live:
        model = Decoder(config, context, whole_model(config), recompute=recompute)
        initialize_parameters(model, 0)
        for linear in linears_of(model).values():
            linear.precision = table[linear.name]
        optimizer = Zero1Optimizer(model.named_parameters(), OptimConfig(), mesh, True, weights_changed)
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
    [
        ("hybrid_tiny", 2, Recompute.none, True),
        ("hybrid_tiny", 4, Recompute.full, False),
        ("hybrid_tiny", 2, Recompute.selective, False),
        ("gpt_tiny", 4, Recompute.none, True),
        ("gpt_tiny", 4, Recompute.selective, False),
        ("gpt_tiny", 8, Recompute.full, False),
    ],
)
def test_memory_is_the_counted_peak(name: str, batch: int, recompute: Recompute, quantized: bool) -> None:
    """A kind of tensor that is forgotten, or counted twice. (Left out: token ids and indices, 8 bytes each.)"""
    config = replace(
        load(name), vocab_size=4096
    )  # so that the peak is not in a quantizer, which a plan takes for a kernel
    measured = measured_peak(config, batch, 128, recompute=recompute, quantized=quantized)
    table = table_of(config, quantized=quantized)
    settings = RankSettings(
        micro_batch=batch, seq_length=128, recompute=recompute, backend=BackendName.emulated, on_gpu=False, table=table
    )
    estimate = stage_memory(config, whole_model(config), settings)
    assert sum(estimate.values()) == pytest.approx(measured, rel=0.01)
    state = sum(estimate[kind] for kind in ("weights", "main gradients", "optimizer"))
    assert estimate["activations"] + estimate["working set"] > 0.2 * state  # or the test would only see the state


PIPELINED = {"micro_batch": 2, "seq_length": 256}
NUM_MICROBATCHES = 8


def pipelined_run(parallel: ParallelConfig) -> RunConfig:
    return RunConfig(
        model=replace(load("gpt_tiny"), vocab_size=1024, num_layers=8),
        parallel=parallel,
        data=DataConfig(seq_length=PIPELINED["seq_length"]),
        train=TrainConfig(micro_batch=PIPELINED["micro_batch"], global_batch=2 * NUM_MICROBATCHES),
    )


def measured_pipeline(process: Process, config: RunConfig) -> int:
    """Peak of live bytes of this rank over the second of two steps."""
    mesh = build_mesh(config.parallel, process.world)
    with LiveBytes() as live:
        table = table_of(config.model, quantized=False)
        trainable = build_trainable(config, table, EmulatedBackend(), mesh, process.device)
        ids = torch.zeros(config.train.global_batch, config.data.seq_length, dtype=torch.int64)
        batch = Inputs(ids, ids, torch.arange(ids.numel()).view_as(ids), ids, ids)
        for _ in range(2):
            live.peak = live.now
            trainable.optimizer.zero_grad()
            microbatches = batch.split(config.train.micro_batch)
            trainable.engine.train(microbatches, 1.0, trainable.optimizer.begin_last_microbatch)
            norm = trainable.optimizer.finish_grads()
            trainable.optimizer.step(norm, lr=1e-4, max_norm=1.0)
    return live.peak


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zbv"])
def test_memory_of_pipeline_ranks(schedule: str) -> None:
    """Microbatches in flight, of stages of unequal size; logits that the last stage keeps; put-off weight gradients."""
    parallel = ParallelConfig(pp=2, dp=1, schedule=schedule)
    config = pipelined_run(parallel)
    measured = run_local(measured_pipeline, 2, config)
    settings = RankSettings(
        **PIPELINED,
        on_gpu=False,
        defers_wgrad=schedule_rule(schedule).defers_wgrad,
        num_microbatches=NUM_MICROBATCHES,
    )
    stages = split_stages(config.model, 2 * stages_per_rank(parallel))
    for rank, works in enumerate(pipeline_order(parallel, NUM_MICROBATCHES)):
        held = {number: stages[number] for number in stages_of_rank(rank, parallel)}
        planned = rank_memory(config.model, held, settings, works)
        assert sum(planned.values()) == pytest.approx(measured[rank], rel=0.05), f"pipeline rank {rank}: {planned}"


def test_deferred_weight_gradients_are_held() -> None:
    """Between B and W a microbatch holds the operands of its weight gradients, and no longer the rest."""
    config, stage = load("gpt_1_2b"), split_stages(load("gpt_1_2b"), 4)[1]
    settings = RankSettings(seq_length=1024, defers_wgrad=True)
    forward, backward, weights = ([Work(kind, 0, n, 1) for n in range(3)] for kind in "FBW")
    at_once = [work for number in range(3) for work in (forward[number], backward[number], weights[number])]
    one = rank_memory(config, {0: stage}, settings, at_once)["activations"]
    put_off = rank_memory(config, {0: stage}, settings, [*at_once[:2], *at_once[3:5], *at_once[6:8], *weights])
    assert one < put_off["activations"] < 3 * one
    assert rank_memory(config, {0: stage}, settings, [*forward, *backward, *weights])["activations"] == 3 * one


def test_memory_shrinks_with_the_layout() -> None:
    """tp divides all but norms and whole rows; dp divides the optimizer; recompute leaves the block inputs."""
    config = load("nemotron_h_12b")
    base = RankSettings()
    whole = stage_memory(config, whole_model(config), base)
    halved = stage_memory(config, whole_model(config), replace(base, tp=2))
    assert halved["weights"] == pytest.approx(whole["weights"] / 2, rel=1e-3)
    assert whole["activations"] / 2 < halved["activations"] < whole["activations"]
    sharded = stage_memory(config, whole_model(config), replace(base, dp=4, cp=2))
    assert sharded["optimizer"] == pytest.approx(whole["optimizer"] / 8)
    recomputed = stage_memory(config, whole_model(config), replace(base, recompute=Recompute.full))
    assert recomputed["activations"] < 0.2 * whole["activations"]
    stages = split_stages(config, 4)
    assert stage_memory(config, whole_model(config), base)["buffers"] == 0.0
    middle = stage_memory(config, stages[1], replace(base, num_microbatches=8))
    assert middle["buffers"] == 8 * 2 * 8192 * 5120 * 2  # activations from one side, gradients from the other
    works = [work._replace(stage=stage) for stage in (0, 2) for work in ONE_MICROBATCH]
    loop = rank_memory(config, {0: stages[0], 2: stages[2]}, base, works)
    assert loop["weights"] == sum(stage_memory(config, stages[i], base)["weights"] for i in (0, 2))


def test_sums_of_gradients_arrive_beside_the_last_backward_pass() -> None:
    """What a rank receives of the buckets that are full by then; at the end, of all; none before the last one."""
    config = load("gpt_1_2b")
    alone, summed = (stage_memory(config, whole_model(config), RankSettings(dp=dp)) for dp in (1, 2))
    beside = summed["working set"] - alone["working set"]
    assert 0 < beside < summed["main gradients"] / 2
    late = RankSettings(dp=2, optim=OptimConfig(bucket_mib=2.0**22))  # none is full before the end
    assert stage_memory(config, whole_model(config), late)["working set"] == alone["working set"]
    short = stage_memory(config, whole_model(config), RankSettings(dp=2, seq_length=64))
    assert short["activations"] + short["working set"] == pytest.approx(short["main gradients"] / 2, rel=0.05)
    works = [*ONE_MICROBATCH, *(work._replace(microbatch=1) for work in ONE_MICROBATCH)]
    twice = rank_memory(config, {0: whole_model(config)}, RankSettings(dp=2), works)
    assert twice["working set"] == summed["working set"]


def test_weight_copies() -> None:
    """2-D tiles need one dequantized copy, 1-D tiles two; Transformer Engine keeps both directions, packed."""
    emulated, te = BackendName.emulated, BackendName.transformer_engine
    assert weight_copy_bytes(nvfp4_paper(), emulated, 2) == 2.0
    assert weight_copy_bytes(nvfp4_paper(square_weights=False), emulated, 2) == 4.0
    assert weight_copy_bytes(nvfp4_paper(), te, 2) == 1.125
