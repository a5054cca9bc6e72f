"""One rank of a run on the fake device, built by the trainer's own `build_trainable`.

It has no checkpoint store and no loaders: files are not rehearsed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megatron_fp4.comm.mesh import Group, build_mesh
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.planning.rehearsal.backend import counted_backend
from megatron_fp4.planning.rehearsal.live import LiveKinds
from megatron_fp4.planning.rehearsal.messages import group_names
from megatron_fp4.planning.rehearsal.watch import Watch
from megatron_fp4.planning.stand_ins import use_fused_norms
from megatron_fp4.train.checked import CheckedConfig
from megatron_fp4.train.engine import LocalEngine
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.run import Run
from megatron_fp4.train.trainable import build_trainable


def build_rank(checked: CheckedConfig, world: Group, device: torch.device, phases: Phases, watch: Watch) -> Run:
    """The run of this rank, on any device; what it computes with is counted by `watch`."""
    config = checked.config
    mesh = build_mesh(config.parallel, world, experts="E" in config.model.letters)
    watch.messages.names = group_names(mesh)
    backend, probes = counted_backend(config, watch.kernels, lambda: watch.live.making("quantized weights"))
    eager = replace(config, optim=replace(config.optim, compile=False))  # fake tensors are not compiled
    table = checked.plan.table()
    trainable = build_trainable(eager, table, backend, mesh, device)
    trainable.draw_given(config, table, mesh, device, backend)
    for stage in trainable.engine.stages:
        use_fused_norms(stage, config.model.norm_impl)
    nothing: Any = None
    return Run(
        config=config,
        mesh=mesh,
        device=device,
        clock=trainable.clock,
        plan=checked.plan,
        engine=trainable.engine,
        optimizer=trainable.optimizer,
        store=nothing,
        loader=nothing,
        examiner=nothing,
        probes=probes,
        phases=phases,
    )


def label_state(run: Run, live: LiveKinds) -> None:
    """Say what the state of a rank is, in the plan's words."""
    parameters = [parameter for stage in run.engine.stages for parameter in logical_parameters(stage)]
    live.label(run.optimizer.kept_tensors(), "optimizer")
    if isinstance(run.engine, LocalEngine) and run.engine.teacher is not None:
        live.label((one for stage in run.engine.teacher.stages for one in stage.parameters()), "teacher")
    live.label(parameters, "weights")  # after the state: FP32 weights are their own masters
    live.label(run.optimizer.gradient_tensors(), "main gradients")
