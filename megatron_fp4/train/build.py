"""From a configuration to the objects of a run, in order, on one screen.

One idea: `prepare` does everything that can be done and refused in one process (arithmetic of the layout, precision
plan, shards, tokenizer), `check_machine` what depends on this rank's machine; `build` then makes what needs the other
ranks. So a bad setting ends a job before any process group exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.checkpoint import CheckpointStore
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.data.evaluation import EvalLoader, build_eval_loader
from megatron_fp4.data.loader import Loader, build_loader
from megatron_fp4.data.text.tokenizer import Tokenizer, load_tokenizer
from megatron_fp4.models.block import LinearInfo, model_linears
from megatron_fp4.models.layout import check_model_layout
from megatron_fp4.models.partition import split_stages
from megatron_fp4.optim import Zero1AdamW, check_schedule
from megatron_fp4.optim.lr import decay_tokens
from megatron_fp4.pipeline.schedules import check_pipeline
from megatron_fp4.precision.backends import Backend, NonFiniteWatch
from megatron_fp4.precision.backends.emulated import EmulatedBackend, compile_obstacle
from megatron_fp4.precision.backends.native_fp8 import NativeFp8Backend
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.te.versions import check_te_linear
from megatron_fp4.train.config import NonFinite, RunConfig
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.faults.rollback_record import RollbackRecord, recall
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.plain import plain
from megatron_fp4.train.requirements import check_choices, check_kernels
from megatron_fp4.train.resume.find import find_resume, settle_differences
from megatron_fp4.train.telemetry.probes import Observers
from megatron_fp4.train.trainable import build_trainable


@dataclass(frozen=True)
class Prepared:
    """What is known before the ranks meet. config: with the vocabulary filled in."""

    config: RunConfig
    linears: list[LinearInfo]
    plan: PrecisionPlan
    dp: int
    tokenizer: Tokenizer | None


@dataclass
class Run:
    """Everything that the trainer drives."""

    config: RunConfig
    mesh: ParallelMesh
    device: torch.device
    clock: StepClock
    plan: PrecisionPlan
    engine: Engine
    optimizer: Zero1AdamW
    store: CheckpointStore
    loader: Loader
    evaluations: list[EvalLoader]
    resumed: dict[str, Any] | None
    """Small state of the checkpoint that this run continues from, or None."""
    watch: NonFiniteWatch | None
    observers: Observers
    changes: str
    """Table of the settings that differ from that checkpoint's."""
    remembered: RollbackRecord | None
    """A rollback of which that checkpoint does not know yet."""
    phases: Phases


def prepare(config: RunConfig, world_size: int) -> Prepared:
    """Check the whole configuration in one process. Raises ValueError (or FileNotFoundError) with the remedy."""
    dp = config.parallel.resolve_dp(world_size)
    config.check_timeouts(world_size)
    config.check_evaluations()
    num_stages = _check_batches(config, dp)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    if config.model.vocab_size == 0:
        if tokenizer is None:
            raise ValueError("model.vocab_size is 0 (take it from the tokenizer), but data.tokenizer is not set")
        config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
    if tokenizer is not None and config.model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size = {config.model.vocab_size} is less than the {tokenizer.vocab_size} of the tokenizer"
            f" {config.data.tokenizer}; set model.vocab_size to 0 (the tokenizer's), or to as many or more"
        )
    check_choices(config)
    tokens = config.train.micro_batch * config.data.seq_length // config.parallel.cp
    check_model_layout(config.model, config.parallel, seq_length=config.data.seq_length, tokens=tokens)
    split_stages(config.model, num_stages, config.parallel.stage_split)
    total = config.run_tokens
    check_schedule(config.optim, total)
    linears = model_linears(config.model)
    decay_start = total - decay_tokens(config.optim, total)
    plan = PrecisionPlan(config.precision, linears, total_tokens=total, decay_start=decay_start)
    plan.check_shapes(linears, tp=config.parallel.tp, tokens=tokens)
    if config.precision.backend is BackendName.transformer_engine:
        for info, (_, table) in itertools.product(linears, plan.phases):
            check_te_linear(info.name, table[info.name], info.local_shape(config.parallel.tp), tokens)
    if config.train.statistics_interval_steps and not any(table.num_quantized_gemms for _, table in plan.phases):
        raise ValueError(
            f"train.statistics_interval_steps = {config.train.statistics_interval_steps} would have no effect: the"
            " precision rules quantize no GEMM; set it to 0"
        )
    return Prepared(config, linears, plan, dp, tokenizer)


def check_machine(config: RunConfig, device: torch.device) -> None:
    """What else can be refused before the ranks meet: packages, their versions, this rank's GPU. Makes nothing lasting.

    Raises ValueError with the remedy.
    """
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        make_backend(config.precision)
        check_kernels(config, device)


def _check_batches(config: RunConfig, dp: int) -> int:
    """Stages of the pipeline, after every size of a step was checked against layout and schedule."""
    num_stages, sizes = 0, config.train.batch_sizes
    for samples in sizes:
        try:
            num_stages = check_pipeline(config.parallel, config.train.gradient_accumulation(dp, samples))
        except ValueError as error:
            if len(sizes) == 1:
                raise
            raise ValueError(f"train.batch_ramp, steps of {samples} samples: {error}") from None
    return num_stages


def make_backend(config: PrecisionConfig, watch: NonFiniteWatch | None = None) -> Backend:
    """The backend that `precision.backend` names. watch: records NaN and Inf instead of raising."""
    if config.backend is BackendName.reference:
        return ReferenceBackend(watch)
    if config.backend is BackendName.emulated:
        return EmulatedBackend(config.compile and not eager_reason(config), watch)
    if config.backend is BackendName.native_fp8:
        return NativeFp8Backend(config, watch)
    return TransformerEngineBackend(config, watch)


def eager_reason(config: PrecisionConfig) -> str:
    """Why the emulated backend runs eagerly although `precision.compile` is on; empty if it does not. Same numbers."""
    on_cpu = not torch.cuda.is_available()
    return compile_obstacle() if config.compile and config.backend is BackendName.emulated and on_cpu else ""


def open_data(
    prepared: Prepared, dp_rank: int, state: dict[str, Any] | None = None, skip: Sequence[list[int]] = ()
) -> tuple[Loader, list[EvalLoader]]:
    """The training and evaluation loaders of one data-parallel rank. state: the loader's, of a checkpoint. skip: sample
    ranges that are not read, beside those of the configuration.
    """
    config, tokenizer = prepared.config, prepared.tokenizer
    fingerprint = tokenizer.fingerprint if tokenizer else None
    vocab_size = config.model.vocab_size
    share: dict[str, Any] = {"micro_batch": config.train.micro_batch, "dp_rank": dp_rank, "dp_size": prepared.dp}
    loader = build_loader(
        replace(config.data, skip=[*config.data.skip, *skip]),
        global_batch=config.train.global_batch,
        total_samples=config.run_samples,
        vocab_size=vocab_size,
        tokenizer_fingerprint=fingerprint,
        state=state,
        **share,
    )
    evaluations = [
        build_eval_loader(config.data, item.name, vocab_size=vocab_size, tokenizer_fingerprint=fingerprint, **share)
        for item in config.data.evaluation
    ]
    return loader, evaluations


def build(prepared: Prepared, process: Process, phases: Phases | None = None) -> Run:
    """Make the run on this rank. Collective: every rank calls it. phases: of the process, where a watchdog has them."""
    config = prepared.config
    phases = phases or Phases(process.device)
    phases.enter("build")
    mesh = build_mesh(config.parallel, process.world)
    run_dir = Path(config.train.run_dir)
    if mesh.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(run_dir / "checkpoints", process.world, config.checkpoint, phases.beat)
    phases.enter("verify_checkpoint")
    resumed = find_resume(config.train.resume, store)
    phases.enter("build")
    changes = settle_differences(resumed["config"], plain(config), config.train.resume_allow) if resumed else ""
    remembered = recall(run_dir, resumed, process.world)
    skip = remembered.skip if remembered else []
    loader, evaluations = open_data(prepared, mesh.dp.rank, resumed["data"] if resumed else None, skip)
    watch = NonFiniteWatch() if config.train.nonfinite is NonFinite.skip else None
    observers = Observers(config.train, make_backend(config.precision, watch), mesh)
    trainable = build_trainable(config, prepared.plan.table(), observers.backend, mesh, process.device)
    optimizer = trainable.optimizer
    if resumed:
        phases.enter("load_checkpoint")
        store.load(resumed["step"], optimizer.state_shards())
        optimizer.step_count = resumed["optimizer_steps"]
        optimizer.after_load()
    return Run(
        config=config,
        mesh=mesh,
        device=process.device,
        clock=trainable.clock,
        plan=prepared.plan,
        engine=trainable.engine,
        optimizer=optimizer,
        store=store,
        loader=loader,
        evaluations=evaluations,
        resumed=resumed,
        watch=watch,
        observers=observers,
        changes=changes,
        remembered=remembered,
        phases=phases,
    )
