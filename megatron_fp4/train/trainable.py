"""The part of a run that computes: clock, stages, engine and optimizer of one rank.

A rank holds a list of stages, usually one. Without pipeline parallelism the list is the whole model and the engine is a
plain loop; otherwise each stage has its own queue of weight gradients and `pipeline.engine` runs them. Trainer and
parity checks build the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from megatron_fp4.comm.mesh import Group, ParallelMesh, build_ends_group, build_stage_group
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.linear import assign_input_amax, assign_precision
from megatron_fp4.layers.moe.balance import LoadBalance
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.models.partition import split_stages
from megatron_fp4.models.qk_clip import QkClip
from megatron_fp4.optim import Algorithm, Zero1Optimizer
from megatron_fp4.pipeline.engine import PipelineEngine, StageShapes, TakeWgrads
from megatron_fp4.pipeline.schedules import schedule_rule, stages_of_rank, stages_per_rank
from megatron_fp4.precision import Backend, StepClock, WgradPlan
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.backends.emulated import compile_obstacle
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import Engine, LocalEngine, TokenLoss


@dataclass
class Trainable:
    """What computes on one rank: forward, backward and update."""

    clock: StepClock
    engine: Engine
    optimizer: Zero1Optimizer

    def learn_from(self, teacher: Engine) -> None:
        """Compare predictions with those of `teacher` from now on; it has this rank's part of the same model."""
        assert isinstance(self.engine, LocalEngine), "refused by check_distillation"
        assert isinstance(teacher, LocalEngine)
        self.engine.teacher = teacher

    def draw_given(
        self, config: RunConfig, table: PrecisionTable, mesh: ParallelMesh, device: torch.device, backend: Backend
    ) -> None:
        """In place of what files and batches give a run: for proofs and rehearsals, which have none.

        A teacher of other drawn weights, and for static scales of inputs a magnitude that some of them exceed.
        """
        for stage in self.engine.stages:
            assign_input_amax(stage, dict.fromkeys(table.static_inputs, 2.0))
        if config.train.distillation.teacher:
            _, teacher = draw_evaluation(config, mesh, device, backend=backend)
            for stage in teacher.stages:
                initialize_parameters(stage, config.train.seed + 1)
            self.learn_from(teacher)


def build_trainable(
    config: RunConfig, table: PrecisionTable, backend: Backend, mesh: ParallelMesh, device: torch.device
) -> Trainable:
    """Initialised stages with their precision, engine and optimizer. Collective over the world."""
    clock = StepClock(config.train.seed)
    dtype = config.precision.compute_dtype.torch_dtype
    numbers = stages_of_rank(mesh.pp.rank, config.parallel)
    wgrad = _wgrad_plan(config, device)
    contexts = [LayerContext.of(mesh, backend, clock, dtype, device, wgrad=wgrad) for _ in numbers]
    copies = config.model.embeds_at_both_ends and not schedule_rule(config.parallel.schedule).v_shaped
    ends = build_ends_group(config.parallel, mesh) if copies and config.parallel.pp > 1 else None
    stages = _make_stages(config, numbers, contexts, ends)
    for stage in stages:
        initialize_parameters(stage, config.train.seed)
        assign_precision(stage, table)

    def weights_changed() -> None:
        clock.weights_version += 1

    together = nn.ModuleList(stages)  # names a table that two stages share once
    sum_dtype = config.precision.compute_dtype.sum_dtype
    peers = build_stage_group(config.parallel, mesh) if config.optim.algorithm is Algorithm.muon else None
    clip = QkClip(stages, config.optim.qk_clip, mesh) if config.optim.qk_clip.threshold else None
    trained = [(name, parameter) for name, parameter in together.named_parameters() if parameter.requires_grad]
    optimizer = Zero1Optimizer(
        trained,
        config.optim,
        mesh,
        True,
        weights_changed,
        sum_dtype,
        stage=peers,
        rows=clip,
        gradient_free=LoadBalance(stages, mesh) if config.model.moe.num_experts else None,
        seed=config.train.seed,
        compile=config.optim.compile and not (device.type == "cpu" and compile_obstacle()),
    )
    optimizer.gather_beside_forward(together)
    queues = [context.queue.take for context in contexts if context.queue is not None]
    return Trainable(clock, _engine(config, stages, queues, mesh, device), optimizer)


NOT_EVALUATED = ("mtp.",)
"""Beginnings of the names of weights that `draw_evaluation` leaves out."""


def draw_evaluation(
    config: RunConfig,
    mesh: ParallelMesh,
    device: torch.device,
    *,
    documents_apart: bool = False,
    backend: Backend | None = None,
) -> tuple[StepClock, Engine]:
    """An engine that only evaluates, of stages that are not filled, and the clock of their noise.

    documents_apart: keep documents of a row apart even if the run does not. The schedule must be one of a stage a rank.
    What predicts the tokens behind the next one is left out. backend: None for the run's, uncompiled.
    """
    backend, clock = backend or make_backend(replace(config.precision, compile=False)), StepClock(config.train.seed)
    apart = replace(
        config,
        model=config.model.with_blocks(config.model.blocks, MtpConfig()),
        data=replace(config.data, reset_documents=documents_apart or config.data.reset_documents),
    )
    stages = draw_stages(apart, backend, mesh, device, clock)
    return clock, _engine(apart, [stage.eval() for stage in stages], [], mesh, device)


def _engine(
    config: RunConfig, stages: list[Decoder], queues: list[TakeWgrads], mesh: ParallelMesh, device: torch.device
) -> Engine:
    model = config.model
    train = config.train
    loss = TokenLoss(model.vocab_size, mesh.tp, model.loss_impl, train.label_smoothing, model.mtp, train.distillation)
    if config.parallel.pp == 1:
        return LocalEngine(stages[0], loss)
    return PipelineEngine(stages, queues, loss, _shapes(config, mesh), config.parallel, mesh.pp, device)


def draw_stages(
    config: RunConfig, backend: Backend, mesh: ParallelMesh, device: torch.device, clock: StepClock | None = None
) -> list[Decoder]:
    """The stages of one rank, built but not filled. Not collective: the mesh may be drawn, the device `meta`."""
    numbers = stages_of_rank(mesh.pp.rank, config.parallel)
    clock, dtype = clock or StepClock(config.train.seed), config.precision.compute_dtype.torch_dtype
    return _make_stages(config, numbers, [LayerContext.of(mesh, backend, clock, dtype, device) for _ in numbers], None)


def _make_stages(
    config: RunConfig, numbers: list[int], contexts: list[LayerContext], ends: Group | None
) -> list[Decoder]:
    parallel = config.parallel
    ranges = split_stages(config.model, parallel.pp * stages_per_rank(parallel), parallel.stage_split)
    stages: list[Decoder] = []
    for number, context in zip(numbers, contexts, strict=True):
        first = stages[0] if stages else None
        stages.append(
            Decoder(
                config.model,
                context,
                ranges[number],
                keep_documents_apart=config.data.reset_documents,
                recompute=config.train.recompute,
                ends=ends,
                shared_table=first.embedding.weight if first is not None and first.stage.has_embedding else None,
            )
        )
    return stages


def _wgrad_plan(config: RunConfig, device: torch.device) -> WgradPlan:
    parallel = config.parallel
    return WgradPlan.choose(
        defer=parallel.pp > 1 and schedule_rule(parallel.schedule).defers_wgrad,
        overlap=parallel.tp > 1 and parallel.overlap_tensor.enabled(device.type),
    )


def _shapes(config: RunConfig, mesh: ParallelMesh) -> StageShapes:
    B, S = config.train.micro_batch, config.data.seq_length // mesh.cp.size
    return StageShapes(
        tokens=(B, S),
        hidden=(B * S // mesh.tp.size, config.model.hidden),
        dtype=config.precision.compute_dtype.torch_dtype,
    )
