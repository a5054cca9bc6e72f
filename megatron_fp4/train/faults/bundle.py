"""What is needed to look at a bad step later: a directory `<run>/spikes/step_<n>`.

    report.json       step, loss, running mean, action; every sample with its documents
    norms.json        parameter and gradient norm of every logical tensor
    quantization.txt  errors of every quantized operand of every linear, as in <run>/quantization/ (if any is quantized)
    config.yaml       the run's settings
    checkpoints/      the newest checkpoint before the step: hard links, which cost nothing and outlive its retention
    replay.sh         one line that runs from there to the bad step again in the run's precision, and one for BF16

Not here: when a step is bad (spikes.py), and the replay (proofs/replay.py).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.checkpoint.directory import step_name
from megatron_fp4.comm.agree import decided_by_rank0
from megatron_fp4.comm.mesh import Group
from megatron_fp4.precision.statistics import Report, report_table
from megatron_fp4.train.faults.rollback import checkpoint_before
from megatron_fp4.train.faults.spikes import Judgement
from megatron_fp4.train.run import Run
from megatron_fp4.train.telemetry.norms import norms_by_tensor
from megatron_fp4.train.telemetry.quantization import measure_again

log = logging.getLogger(__name__)

REPORT = "report.json"
SPIKES = "spikes"


@dataclass(frozen=True)
class BadStep:
    """A step whose loss is a spike.

    first_sample: number of samples consumed before it. first_spike: first step of the spikes in a row. rerun_step:
    makes forward and backward of the step once more.
    """

    step: int
    first_sample: int
    first_spike: int
    rerun_step: Callable[[], object]


def write_bundle(run: Run, judgement: Judgement, bad: BadStep) -> Path:
    """Write the directory of a bad step; returns its path. Collective; rank 0 writes.

    Trouble with the disk is logged and does not end the run. The step's gradients are gone afterwards.
    """
    directory = Path(run.config.train.run_dir) / SPIKES / f"step_{bad.step:08}"
    norms = norms_by_tensor(run.optimizer)
    checkpoint = checkpoint_before(run, bad.first_spike)
    statistics = _measure(run, bad)
    if run.mesh.is_main:
        report = {
            "step": bad.step,
            "action": judgement.action.name,
            "loss": judgement.loss,
            "mean": judgement.mean,
            "deviation": judgement.deviation,
            "consumed_samples": bad.first_sample,
            "checkpoint": checkpoint,
            "samples": samples_of(run, bad.first_sample),
        }
        try:
            _write(run, directory, report, norms, statistics, checkpoint)
        except OSError as error:
            log.warning("%s is not complete: %s", directory, error)
    return directory


def _measure(run: Run, bad: BadStep) -> Report:
    """Quantization statistics of the step; what its second backward adds to the gradients is never used."""
    run.optimizer.zero_grad()
    return measure_again(run, bad.step, bad.rerun_step)


def samples_of(run: Run, first_sample: int) -> list[dict[str, Any]]:
    """The global batch: id, source and documents of every sample."""
    origins = run.loader.origins(first_sample, run.config.train.batch_at(first_sample))
    return [
        {
            "sample_id": origin.sample_id,
            "source": origin.source,
            "pieces": [piece._asdict() for piece in run.loader.describe(origin)],
        }
        for origin in origins
    ]


def replay_command(directory: Path) -> str:
    return f"megatron-fp4 replay '{directory.resolve()}'"


def _write(
    run: Run,
    directory: Path,
    report: dict[str, Any],
    norms: dict[str, Any],
    statistics: Report,
    checkpoint: int | None,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    (directory / "norms.json").write_text(json.dumps(norms, indent=1) + "\n")
    if statistics:
        (directory / "quantization.txt").write_text(report_table(statistics.items()) + "\n")
    command = replay_command(directory)
    (directory / "replay.sh").write_text(f"{command}\n{command} --precision bf16\n")
    stored = Path(run.config.train.run_dir) / "config.yaml"
    if stored.exists():
        shutil.copy(stored, directory / stored.name)
    if checkpoint is not None:
        target = directory / "checkpoints" / step_name(checkpoint)
        if not target.exists():
            shutil.copytree(run.store.root / step_name(checkpoint), target, copy_function=_link)


@contextmanager
def replay_folder(bundle: Path, world: Group) -> Iterator[Path]:
    """A run directory with the bundle's checkpoint, which all ranks see, removed at the end. Collective.

    Several ranks have it beside the bundle, which all nodes see; there it holds links and no copies.
    """

    def make() -> Path:
        folder = Path(tempfile.mkdtemp(prefix="replay-", dir=bundle.parent if world.size > 1 else None))
        if (bundle / "checkpoints").is_dir():
            shutil.copytree(bundle / "checkpoints", folder / "checkpoints", copy_function=_link)
        return folder.absolute()

    folder = decided_by_rank0(make, world, OSError)
    try:
        yield folder
        decided_by_rank0(lambda: shutil.rmtree(folder, ignore_errors=True), world)
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # without hard links, or another file system
        shutil.copy2(source, target)
    return target
