"""From a checked configuration to the objects of a run, in order, on one screen. Every rank builds its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fp4.checkpoint import CheckpointStore
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.data.evaluation import EvalLoader
from megatron_fp4.data.loader import Loader
from megatron_fp4.optim import Zero1AdamW
from megatron_fp4.precision.backends import NonFiniteWatch
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.settings import to_json_values
from megatron_fp4.train.checked import CheckedConfig, open_data
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.faults.rollback_record import RollbackRecord, recall
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.resume.differences import changes_on_resume
from megatron_fp4.train.resume.find import find_resume
from megatron_fp4.train.sections import NonFinite
from megatron_fp4.train.telemetry.probes import Observers
from megatron_fp4.train.trainable import build_trainable


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


def build(checked: CheckedConfig, process: Process, phases: Phases | None = None) -> Run:
    """Make the run on this rank. Collective: every rank calls it. phases: of the process, where a watchdog has them."""
    config = checked.config
    phases = phases or Phases(process.device)
    phases.enter("build")
    mesh = build_mesh(config.parallel, process.world)
    run_dir = Path(config.train.run_dir)
    if mesh.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(run_dir / "checkpoints", process.world, config.checkpoint, phases.beat)
    phases.enter("verify_checkpoint")
    chosen = find_resume(config.train.resume, store)
    resumed = chosen.meta if chosen else None
    phases.enter("build")
    changes = changes_on_resume(resumed["config"], to_json_values(config), config.train.resume_allow) if resumed else ""
    remembered = recall(run_dir, resumed, process.world)
    skip = remembered.skip if remembered else []
    loader, evaluations = open_data(checked, mesh.dp.rank, resumed["data"] if resumed else None, skip)
    watch = NonFiniteWatch() if config.train.nonfinite is NonFinite.skip else None
    observers = Observers(config.train, make_backend(config.precision, watch), mesh)
    trainable = build_trainable(config, checked.plan.table(), observers.backend, mesh, process.device)
    optimizer = trainable.optimizer
    if chosen:
        phases.enter("load_checkpoint")
        store.load(chosen, optimizer.state_shards())
        optimizer.step_count = chosen.meta["optimizer_steps"]
        optimizer.after_load()
    return Run(
        config=config,
        mesh=mesh,
        device=process.device,
        clock=trainable.clock,
        plan=checked.plan,
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
