"""From a checked configuration to the objects of a run, in order, on one screen. Every rank builds its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint import CheckpointStore
from megatron_fp4.comm.bootstrap import Process, connect_mesh
from megatron_fp4.train.checked import CheckedConfig, settle_decay
from megatron_fp4.train.evaluation.inputs import settle_inputs
from megatron_fp4.train.faults.rollback import RollbackRecord, recall
from megatron_fp4.train.opened import OpenedData, build_indices, examiner, open_together
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.resume.differences import changes_on_resume
from megatron_fp4.train.resume.origin import begin, choose_checkpoint
from megatron_fp4.train.run import Position, Run
from megatron_fp4.train.telemetry.probes import probed_backend
from megatron_fp4.train.trainable import build_trainable


@dataclass(frozen=True)
class Start:
    """What a launch of a run starts from.

    checked: the settings by which it goes on, `train.decay_from` settled. meta: small state of the checkpoint that it
    continues, None in a new run. changes: table of the settings that differ from that checkpoint's, "" if none.
    remembered: a rollback of which that checkpoint does not know yet.
    """

    checked: CheckedConfig
    position: Position
    meta: dict[str, Any] | None
    changes: str
    remembered: RollbackRecord | None

    @property
    def of_data(self) -> tuple[dict[str, Any] | None, list[list[int]]]:
        """State of the training loader, and sample ranges that it does not read: what `open_together` takes."""
        return self.meta["data"] if self.meta else None, self.remembered.skip if self.remembered else []


def build(
    checked: CheckedConfig,
    process: Process,
    phases: Phases | None = None,
    opened: OpenedData | None = None,
) -> tuple[Run, Start]:
    """Make the run on this rank. Collective: every rank calls it. phases: the process's, where a watchdog has them.
    opened: the data of this configuration, where they are open already.

    Raises ValueError for what only a started job can see: the run directory, a checkpoint, data that do not go on from
    it. All of that is looked at before the model is made and read. Raises RanksNotMet as `connect_mesh`.
    """
    config = checked.config
    phases = phases or Phases(process.device)
    phases.enter("groups")
    mesh = connect_mesh(config.parallel, process, experts="E" in config.model.letters)
    phases.enter("build")
    run_dir = Path(config.train.run_dir)
    if mesh.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    mirror = config.checkpoint.mirror
    store = CheckpointStore(run_dir / "checkpoints", process.world, config.checkpoint, phases.beat, mirror)
    phases.enter("verify_checkpoint")
    chosen = choose_checkpoint(config.train.resume, store)
    phases.enter("build")
    start = _find_start(checked, chosen.meta if chosen else None, process)
    data = open_together(start.checked, mesh, *start.of_data, opened)
    backend, probes = probed_backend(config)
    trainable = build_trainable(config, checked.plan.table(), backend, mesh, process.device)
    optimizer = trainable.optimizer
    phases.enter("load_checkpoint")
    origin = begin(config, chosen, trainable, mesh, phases.beat)
    if chosen:
        loaded = store.load_or_earlier(chosen, optimizer.state_to_fill())
        if loaded is not chosen:
            start = _find_start(checked, loaded.meta, process)
            data = open_together(start.checked, mesh, *start.of_data, opened)
        optimizer.after_load(loaded.meta["optimizer_steps"])
    phases.enter("index")
    build_indices(data, start.position.samples, process)
    phases.enter("build")
    checked, place = start.checked, (start.meta, start.position.samples, phases.beat)
    origin |= settle_inputs(checked.config, checked.plan, trainable.engine, data.loader, mesh, *place)
    run = Run(
        config=checked.config,
        mesh=mesh,
        device=process.device,
        clock=trainable.clock,
        plan=checked.plan,
        engine=trainable.engine,
        optimizer=optimizer,
        store=store,
        loader=data.loader,
        examiner=examiner(checked, trainable.engine, data, mesh, process.device),
        probes=probes,
        phases=phases,
        rendezvous=process.rendezvous,
        origin=origin,
    )
    return run, start


def _find_start(checked: CheckedConfig, meta: dict[str, Any] | None, process: Process) -> Start:
    """Collective. Raises ValueError for a setting that may not differ from the checkpoint's."""
    position = Position.from_meta(meta) if meta else Position()
    remembered = recall(Path(checked.config.train.run_dir), meta, process.world)
    kept = remembered.decay_from if remembered else ""
    if meta and not kept:
        kept = meta["config"]["train"].get("decay_from", "")
    checked = settle_decay(checked, kept, position.samples)
    changes = changes_on_resume(meta, checked.config) if meta else ""
    return Start(checked, position, meta, changes, remembered)
