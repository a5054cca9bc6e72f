"""A rank's life in a job: check, meet, agree, lock, build, fit, leave.

Whatever can be refused by one rank alone is refused before the ranks meet, and whatever they must have alike before
there is a process group; the watchdog watches the whole life. The exit codes are those of faults/signals.py.

Not here: arguments and YAML (cli/pretrain.py), what is compared and how a rank refuses (arrival/). The resolved
settings come as text, for the run directory.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_fp4.checkpoint import SaveFailed
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.bootstrap import Process, choose_device, exit_process, start_process, stop_process
from megatron_fp4.comm.collectives import broadcast_object
from megatron_fp4.comm.host_memory import keep_freed_memory
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.rendezvous import RankFailed, RanksNotMet, Rendezvous, meet
from megatron_fp4.data.foreign import check_unnamed
from megatron_fp4.data.overlap import check_heldout
from megatron_fp4.settings import to_json_values
from megatron_fp4.storage.durable import write_durably
from megatron_fp4.storage.lock import STALE_SECONDS, RunLocked, RunUnwritable
from megatron_fp4.train.arrival.agreement import Part, agree_on, parts_of_run, parts_of_start
from megatron_fp4.train.arrival.backend import PATIENCE_SECONDS, settle_backend
from megatron_fp4.train.arrival.locking import RunHold, hold_run
from megatron_fp4.train.arrival.refusals import SETTINGS, GivenSettings, give_up, refuse, refuse_start, refuse_together
from megatron_fp4.train.build import Start, build
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.faults.guard import SpikeGuard
from megatron_fp4.train.faults.signals import EXIT_FAILED, EXIT_OK, StopRequest
from megatron_fp4.train.faults.watchdog import Watchdog
from megatron_fp4.train.history.launches import record_launch
from megatron_fp4.train.opened import OpenedData, open_data
from megatron_fp4.train.phases import INDEX_SECONDS, Phases
from megatron_fp4.train.refusals.requirements import check_machine
from megatron_fp4.train.resume.description import describe_end, describe_origin, describe_resume
from megatron_fp4.train.resume.same_model import check_origin
from megatron_fp4.train.resume.saving import finish_mirror
from megatron_fp4.train.run import Run, TrainingDiverged
from megatron_fp4.train.sections import NOW
from megatron_fp4.train.telemetry.announce import describe_run
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.operator.events import Events
from megatron_fp4.train.telemetry.operator.hook import check_environment
from megatron_fp4.train.trainer import Outputs, fit

log = logging.getLogger(__name__)
HUNG_CLOSE_SECONDS = 4.0
"""What a hung job gives its last event: the watchdog ends the process a little later."""


class _Prepared(NamedTuple):
    """What a rank has before it meets the others. parts: what they compare."""

    checked: CheckedConfig
    data: OpenedData
    parts: Mapping[str, Part]


def run_rank(settings: GivenSettings, launch: Launch) -> int:
    """Live as one rank; returns the exit code."""
    phases = Phases(torch.device("cpu"))  # the device is known when the ranks have met
    with _watchdog(settings.config, phases, launch) as watchdog:
        phases.enter("prepare")
        parts = parts_of_start(settings.written)
        try:
            checked = check_config(settings.config, launch.world_size)
            phases.enter("index")
            device = choose_device(settings.config.train.device, launch.local_rank)
            data = open_data(checked, dp_rank=0)
            parts |= parts_of_run(checked, data, device.type)
            check_machine(checked.config, device)
            check_origin(checked.config)
            if launch.rank == 0:
                check_environment(checked.config.logging.on_event)
        except (ValueError, FileNotFoundError) as error:
            phases.enter("rendezvous")
            return refuse_start(error, launch, parts, settings.rendezvous)
        with StopRequest(settings.config.train.exit_after_seconds, speaks=launch.rank == 0) as stop:
            try:
                return _meet_and_train(_Prepared(checked, data, parts), settings, launch, phases, watchdog, stop)
            except RanksNotMet as error:
                return give_up(error)


def _watchdog(config: RunConfig, phases: Phases, launch: Launch) -> Watchdog:
    """The watchdog of the whole life. What has a time-out of its own, which says more, gets that on top."""
    extra = {
        "index": INDEX_SECONDS,
        "rendezvous": config.parallel.init_timeout_seconds,
        "groups": config.parallel.init_timeout_seconds,
        "selftest": 4 * PATIENCE_SECONDS,
        "lock": STALE_SECONDS,
        "save": config.checkpoint.timeout_seconds,
    }
    return Watchdog(phases, launch.rank, config.train.hang_timeout_seconds, extra)


def _meet_and_train(
    prepared: _Prepared, settings: GivenSettings, launch: Launch, phases: Phases, watchdog: Watchdog, stop: StopRequest
) -> int:
    config, parallel = prepared.checked.config, prepared.checked.config.parallel
    patience = min(parallel.init_timeout_seconds, parallel.timeout_seconds)
    phases.enter("rendezvous")
    try:
        rendezvous = settings.rendezvous or meet(launch, patience)
        if launch.rank == 0:
            rendezvous.told_by_rank0(SETTINGS, settings.text, patience)
    except ValueError as error:
        return refuse(error, speaks=launch.rank == 0)
    try:
        agree_on(prepared.parts, rendezvous, patience)
        rendezvous.wait_for_all("the start", patience)  # who has died is not waited for as long as data may take
        phases.enter("index")
        _look_at_data(prepared, rendezvous)
        phases.enter("selftest")
        device = choose_device(config.train.device, launch.local_rank)
        checked = settle_backend(prepared.checked, launch.world_size, rendezvous, device)
    except ValueError as error:
        return refuse_together(error, rendezvous)
    phases.enter("rendezvous")
    process = start_process(config.train.device, parallel.timeout_seconds, launch, patience, rendezvous)
    phases.device = process.device
    watchdog.meet(process.world)
    watchdog.last_act = lambda: stop.last_act()
    if process.device.type == "cpu":
        keep_freed_memory()
    try:
        return _lock_and_train(prepared._replace(checked=checked), settings.text, process, phases, stop, watchdog)
    finally:
        stop_process(process)


def _look_at_data(prepared: _Prepared, rendezvous: Rendezvous) -> None:
    """Compare held-out text and tokenizer with the data, on rank 0, which warns. Raises ValueError on all ranks."""
    loader, evaluations, _ = prepared.data

    def look(_: Sequence[str]) -> str:
        unnamed = check_unnamed(loader, evaluations, prepared.checked.tokenizer)
        for line in [*check_heldout(loader, evaluations), *unnamed]:
            log.warning(line)
        return ""

    rendezvous.decided_by_rank0("held-out text", "", look, INDEX_SECONDS)


def _lock_and_train(
    prepared: _Prepared, config_text: str, process: Process, phases: Phases, stop: StopRequest, watchdog: Watchdog
) -> int:
    checked = prepared.checked
    config, is_main = checked.config, process.world.rank == 0
    phases.enter("lock")
    try:
        mirror = config.checkpoint.mirror
        hold = hold_run(config.train.run_dir, mirror, process.world, lambda: exit_process(1), phases.beat)
    except RunLocked as error:
        return refuse(error, speaks=is_main)
    stop.last_act = hold.release
    events = Events(Path(config.train.run_dir) if is_main else None, config.logging)
    watchdog.last_act = partial(_end_hung, events, phases, hold)
    console = Console(enabled=is_main, interval_steps=config.train.log_interval_steps, events=events)
    try:
        try:
            run, start = build(checked, process, phases, prepared.data)
            phases.enter("announce")
            _announce(run, start, config_text, console)
            outputs = _open_outputs(run, start, console, stop)
        except ValueError as error:
            events.add("fail", phases.current.step, f"refused: {error}")
            return refuse(error, speaks=is_main)
        try:
            code = fit(run, start, outputs)
            console.say(describe_end(checked.config, start.position, stopped=code != EXIT_OK))
            phases.enter("mirror")
            finish_mirror(run, outputs.metrics, console, stopped=code != EXIT_OK)
            return code
        except (SaveFailed, TrainingDiverged, RankFailed) as error:  # the same on all ranks
            if isinstance(error, RankFailed):
                process.rendezvous.leave()
            events.add("fail", phases.current.step, str(error))
            refuse(error, speaks=is_main)
            return EXIT_FAILED
        except BaseException as error:
            events.add("fail", phases.current.step, f"{type(error).__name__}: {error}")
            raise
        finally:
            phases.enter("leave")
            outputs.metrics.close()
    finally:
        hold.release()
        console.close()
        events.close()


def _end_hung(events: Events, phases: Phases, hold: RunHold) -> None:
    """The last act of a hung job on this rank. The lock first: a start elsewhere would wait for it."""
    hold.release()
    step, phase, _ = phases.current
    events.add("hang", step, f"no progress in phase {phase} of step {step}; the job ends, and its log says which rank")
    events.close(HUNG_CLOSE_SECONDS)


def _announce(run: Run, start: Start, config_text: str, console: Console) -> None:
    """Say what will run, and store it in the run directory. Collective. Raises ValueError: see `_write`."""
    checked = start.checked
    settled = f"decay_from: '{checked.config.train.decay_from}'\n"
    config_text = config_text.replace(f"decay_from: {NOW}\n", settled)
    tokens = {name: stream.documents.num_tokens for name, stream in run.loader.streams.items()}
    paragraphs = [*checked.choice, *describe_run(checked, run.mesh.world.size, run.device, tokens)]
    if start.meta:
        paragraphs += describe_resume(checked, start.meta, start.changes, str(start.remembered or ""))
    elif weights := run.origin.get("init_from"):
        paragraphs += describe_origin(weights, checked.tokenizer if run.mesh.is_main else None)
    for paragraph in paragraphs:
        console.say(paragraph)
    step, ranks = start.position.step, run.mesh.world.size
    text = f"{ranks} rank(s) go on after step {step}" if start.meta else f"{ranks} rank(s) begin"
    console.events.add("resume" if start.meta else "start", step, text)
    texts = {"config.yaml": config_text, "precision.txt": "\n".join([*checked.choice, checked.plan.describe(), ""])}
    for name, text in texts.items():
        path = Path(run.config.train.run_dir) / name
        _write(partial(write_durably, path, text.encode()), run)


def _open_outputs(run: Run, start: Start, console: Console, stop: StopRequest) -> Outputs:
    """Collective: all ranks store the same wandb id. Raises ValueError: see `_write`."""
    wandb_id = start.meta["wandb_id"] if start.meta else uuid.uuid4().hex[:12]
    wandb_id = broadcast_object(wandb_id, run.mesh.world)
    settings, run_dir = to_json_values(run.config), Path(run.config.train.run_dir)
    step, opened = start.position.step, list[Metrics]()

    def open_metrics() -> None:
        config = run.config.logging
        opened.append(Metrics.open(config, run_dir, resume_step=step, wandb_id=wandb_id, settings=settings))

    _write(open_metrics, run)
    _write(partial(record_launch, run, step), run)
    metrics = opened[0] if opened else Metrics()
    return Outputs(metrics, console, stop, SpikeGuard(run, console, start.meta, start.remembered), wandb_id)


def _write(write: Callable[[], object], run: Run) -> None:
    """`write()` on the main rank. Collective. Raises ValueError on all ranks if the file system refuses it."""
    try:
        decided_by_rank0(lambda: write() is None, run.mesh.world, OSError)
    except OSError as error:
        raise ValueError(str(RunUnwritable.by(error, run.config.train.run_dir))) from None
