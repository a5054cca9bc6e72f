"""What looks at a training step without changing it: the GEMM ledger and the quantization statistics.

Both are backends that wrap the run's backend, so they see what the linears really do, under any pipeline schedule or
recomputation. They record only inside `watching`, on the steps that are due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.precision.backends import Backend, NonFiniteWatch
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.ledger import GemmLedger, GemmMismatch, differences
from megatron_fp4.precision.statistics import Report, StatisticsProbe
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.run import Probes, Run
from megatron_fp4.train.sections import NonFinite
from megatron_fp4.train.telemetry import quantization
from megatron_fp4.train.telemetry.metrics import Metrics

MAX_LINES = 20


def probed_backend(config: RunConfig) -> tuple[Backend, Probes]:
    """The backend of the run's linears, and what it is wrapped in as `train.nonfinite`, `train.check_gemms`,
    `train.statistics_interval_steps` and `train.spikes` ask.
    """
    train, probes = config.train, Probes()
    if train.nonfinite is NonFinite.skip:
        probes.nonfinite = NonFiniteWatch()
    backend = make_backend(config.precision, probes.nonfinite)
    if train.statistics_interval_steps or train.spikes.enabled:
        backend = probes.statistics = StatisticsProbe(backend)
    if train.check_gemms:
        backend = probes.gemms = GemmLedger(backend)
    return backend, probes


@contextmanager
def watching(run: Run, step: int, table: PrecisionTable, num_microbatches: int) -> Iterator[None]:
    """Around forward and backward of `step` (1-based) under `table`.

    Collective on a step whose GEMMs are checked: the first one under `table`. Raises GemmMismatch on all ranks if one
    of them executed other GEMMs.
    """
    gemms, statistics = run.probes.gemms, run.probes.statistics
    checks = gemms is not None and table is not run.probes.checked_table
    if gemms is not None:
        gemms.recording = checks
    if statistics is not None:
        statistics.recording = _due(run, step)
    yield
    if statistics is not None:
        statistics.recording = False
    if gemms is not None and checks:
        gemms.recording = False
        run.probes.checked_table = table
        _check(run, gemms, step, table, num_microbatches)


def write_statistics(run: Run, step: int, metrics: Metrics) -> None:
    """Write what was measured during `step`, if it was due. Collective over the world."""
    if run.probes.statistics is None or not _due(run, step):
        return
    report = quantization.gather(run.probes.statistics.take(), run.mesh)
    if report and run.mesh.is_main:
        quantization.write(report, step, Path(run.config.train.run_dir), metrics)


def measure(run: Run, step: int, rerun_step: Callable[[], object]) -> Report:
    """Statistics of a step that turned out to be bad; empty where nothing is quantized. Collective over the world.

    rerun_step: makes its forward and backward once more, which is not needed on a step that was due.
    """
    statistics = run.probes.statistics
    if statistics is None:
        return {}
    if _due(run, step):
        return quantization.gather(statistics.report, run.mesh)
    statistics.recording = True
    rerun_step()
    statistics.recording = False
    return quantization.gather(statistics.take(), run.mesh)


def _due(run: Run, step: int) -> bool:
    interval = run.config.train.statistics_interval_steps
    return interval > 0 and step % interval == 0


def _check(run: Run, gemms: GemmLedger, step: int, table: PrecisionTable, num_microbatches: int) -> None:
    names = [name for stage in run.engine.stages for name in linears_of(stage)]
    full = run.config.train.recompute is Recompute.full
    local_lines = differences(
        gemms.take(),
        {name: table[name] for name in names},
        num_microbatches=num_microbatches,
        recomputed=[name for name in names if full and name.startswith("blocks.")],
    )
    lines = list(dict.fromkeys(line for part in all_gather_object(local_lines, run.mesh.world) for line in part))
    if lines:
        shown = lines[:MAX_LINES] + ([f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else [])
        raise GemmMismatch(f"step {step}: GEMMs that are not as in the precision table:\n" + "\n".join(shown))
