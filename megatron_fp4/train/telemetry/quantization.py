"""Quantization statistics of a training step: when they are measured, and where they go.

Every so many steps a table in the run directory, and a few scalars per linear to the metrics. Statistics are those of
the rank's part of a tensor; the ranks with tensor, context and data coordinate 0 report theirs.

Not here: how a tensor is measured (precision/statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_fp4.comm.agree import gather_to_rank0
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.precision.statistics import Report, report_table
from megatron_fp4.precision.statistics_probe import StatisticsProbe
from megatron_fp4.train.run import Run
from megatron_fp4.train.telemetry.metrics import Metrics

FOLDER = "quantization"
LOGGED = ("snr_db", "underflow", "saturation")
"""What goes to the metrics, per linear and operand; the table has everything."""


def measures(run: Run, step: int) -> bool:
    """Whether the operands of `step` are measured."""
    interval = run.config.train.statistics_interval_steps
    return interval > 0 and step % interval == 0


def begin_measuring(run: Run, statistics: StatisticsProbe) -> None:
    """Record what is quantized from now on, weights too: those that are kept from the last pass are made anew."""
    statistics.recording = True
    run.clock.weights_version += 1


def write_statistics(run: Run, step: int, metrics: Metrics) -> None:
    """Write what was measured during `step`, if anything was. Collective over the world."""
    if run.probes.statistics is None or not measures(run, step):
        return
    report = _gather(run.probes.statistics.take(), run.mesh)
    if not report or not run.mesh.is_main:
        return
    folder = Path(run.config.train.run_dir) / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:08}.txt").write_text(report_table(report.items()) + "\n")
    values = {f"{FOLDER}/{name}/{field}": getattr(stats, field) for name, stats in report.items() for field in LOGGED}
    metrics.write(step, values)


def measure_again(run: Run, step: int, rerun_step: Callable[[], object]) -> Report:
    """Statistics, on the main rank, of a step that turned out to be bad; empty elsewhere. Collective over the world.

    rerun_step: makes its forward and backward once more, which is not needed on a step that was measured.
    """
    statistics = run.probes.statistics
    if statistics is None:
        return {}
    if measures(run, step):
        return _gather(statistics.report, run.mesh)
    begin_measuring(run, statistics)
    rerun_step()
    statistics.recording = False
    return _gather(statistics.take(), run.mesh)


def _gather(report: Report, mesh: ParallelMesh) -> Report:
    """The reports of all pipeline stages on the main rank, in order of the blocks. Collective over its pipeline."""
    merged: Report = {}
    if mesh.tp.rank == mesh.cp.rank == mesh.dp.rank == 0:
        for part in gather_to_rank0(report, mesh.pp):
            merged |= part
    return dict(sorted(merged.items(), key=lambda item: model_order(item[0])))


def model_order(name: str) -> tuple[int, str]:
    """Sorts names by the number of their block; what is in no block comes last."""
    first, _, rest = name.partition(".")
    return (int(rest.split(".")[0]), name) if first == "blocks" else (1 << 30, name)
