"""Build one rank of a run and make its steps, with the trainer's own objects: `build_trainable` and `train_step`.

What is not the trainer's: the batch has no text, the checkpoint store no directory, and what only CUDA has is stood in
for (the kernels of planning/stand_ins.py; backends that need a GPU by operands of the same size).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast
from unittest.mock import patch

import torch

from megatron_fp4.comm.config import Overlap
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.data.batch import Batch
from megatron_fp4.pipeline.schedules import schedule_rule
from megatron_fp4.planning.rehearsal.device import NAME, rehearsal_device
from megatron_fp4.planning.rehearsal.kernels import CountedBackend
from megatron_fp4.planning.rehearsal.messages import group_names
from megatron_fp4.planning.rehearsal.watch import Watch
from megatron_fp4.planning.rehearsal.world import fake_world
from megatron_fp4.planning.stand_ins import DEQUANTIZING, SizedBackend, use_fused_norms
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.backends.product import BY_DEVICE, multiply_on_cuda
from megatron_fp4.precision.probes import Probes
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.run import Position, Run
from megatron_fp4.train.step import train_step
from megatron_fp4.train.telemetry.probes import probed_backend
from megatron_fp4.train.trainable import build_trainable


@dataclass
class RehearsedRank:
    """A rank whose parts exist. num_microbatches: of a step."""

    run: Run
    watch: Watch
    num_microbatches: int
    position: Position

    def step(self, num_microbatches: int | None = None) -> None:
        """Make a step; what it does is in `watch`, from nothing. num_microbatches: as in the run, unless said."""
        number = num_microbatches or self.num_microbatches
        batch = _batch(number * self.run.config.train.micro_batch, self.run.config.data.seq_length)
        self.watch.clear()
        self.position = train_step(self.run, batch, self.position, _Calm(), lambda: False).position


class _Calm:
    """No loss is a spike."""

    def passes(self, loss: float, position: Position, rerun_step: Callable[[], object]) -> bool:
        return True


@contextmanager
def rehearsed_rank(
    checked: CheckedConfig, num_gpus: int, rank: int, on_backward_error: Callable[[str], NoReturn]
) -> Iterator[RehearsedRank]:
    """The rank, built; it may step for as long as the context lasts. Raises RehearsalRefused."""
    device = rehearsal_device()
    phases = Phases(torch.device("cpu"))
    phases.enter("build")
    watch = Watch(lambda: phases.current.name, on_backward_error)
    with fake_world(num_gpus, rank) as world, watch.watching(), patch.dict(BY_DEVICE, {NAME: multiply_on_cuda}):
        config = _as_on_cuda(checked.config)
        mesh = build_mesh(config.parallel, world)
        watch.messages.names = group_names(mesh)
        run = _build(replace(checked, config=config), mesh, device, phases, watch)
        microbatches = config.train.gradient_accumulation(checked.dp, config.train.global_batch)
        yield RehearsedRank(run, watch, microbatches, Position())


def _build(checked: CheckedConfig, mesh: ParallelMesh, device: torch.device, phases: Phases, watch: Watch) -> Run:
    config = checked.config
    inner, probes = _backend(config)
    backend = CountedBackend(inner, watch.kernels, lambda: watch.live.making("quantized weights"))
    trainable = build_trainable(config, checked.plan.table(), backend, mesh, device)
    for stage in trainable.engine.stages:
        use_fused_norms(stage, checked.config.model.norm_impl)
    optimizer = trainable.optimizer
    parameters = [parameter for stage in trainable.engine.stages for parameter in logical_parameters(stage)]
    state = [tensor for shard in optimizer.state_shards() for tensor in shard.tensors.values()]
    watch.live.label(state, "optimizer")
    watch.live.label(parameters, "weights")  # FP32 weights are their own masters
    watch.live.label(
        [parameter.main_grad for parameter in parameters if parameter.main_grad is not None], "main gradients"
    )
    nothing: Any = None
    return Run(
        config=config,
        mesh=mesh,
        device=device,
        clock=trainable.clock,
        plan=checked.plan,
        engine=trainable.engine,
        optimizer=optimizer,
        store=nothing,
        loader=nothing,
        evaluations=[],
        probes=probes,
        phases=phases,
    )


def _backend(config: RunConfig) -> tuple[Backend, Probes]:
    """The run's own, where it is made of torch's operations; else one whose operands are as large."""
    if config.precision.backend in DEQUANTIZING:
        return probed_backend(config)
    return SizedBackend(config.precision.backend, on_gpu=True), Probes()


def _as_on_cuda(config: RunConfig) -> RunConfig:
    """The configuration with its `auto` as it is on CUDA, and without what looks at steps."""
    parallel, optim = config.parallel, config.optim
    if parallel.overlap_tensor is Overlap.auto and parallel.tp > 1:
        defers = parallel.pp > 1 and schedule_rule(parallel.schedule).defers_wgrad
        parallel = replace(parallel, overlap_tensor=Overlap.auto if defers else Overlap.always)
    overlaps = {
        name: Overlap.always for name in ("overlap_reduce", "overlap_gather") if getattr(optim, name) is Overlap.auto
    }
    train = replace(config.train, check_gemms=False, statistics_interval_steps=0)
    return replace(
        config,
        model=config.model.by_torch(),
        parallel=parallel,
        optim=replace(optim, **cast(dict[str, Any], overlaps)),
        train=train,
    )


def _batch(rows: int, seq_length: int) -> Batch:
    """Rows without text, in which every position is a target."""
    zeros = torch.zeros(rows, seq_length, dtype=torch.int64)
    mask = torch.ones(rows, seq_length, dtype=torch.bool)
    return Batch(zeros, zeros, mask, zeros, zeros, zeros, torch.zeros(rows, dtype=torch.int64))
