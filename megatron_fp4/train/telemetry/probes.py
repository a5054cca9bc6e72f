"""What looks at a training step without changing it: GEMM ledger, quantization statistics, live channels, size of the
residual stream, shares of the losses.

The first three are backends that wrap the run's backend, so they see what the linears really do, under any pipeline
schedule or recomputation. All record only inside `watching`, on the steps that are due.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fp4.comm.collectives import tell_first
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.ledger import GemmLedger, GemmMismatch, differences
from megatron_fp4.precision.probes import Probes, make_probed_backend
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.run import Run
from megatron_fp4.train.telemetry.quantization import begin_measuring, measures

MAX_LINES = 20


def probed_backend(config: RunConfig) -> tuple[Backend, Probes]:
    """The backend of the run's linears, with the probes that the settings of `train` ask for."""
    train = config.train
    return make_probed_backend(
        config.precision,
        gemms=train.check_gemms,
        statistics=train.statistics_interval_steps > 0 or train.spikes.enabled,
        channels=train.statistics_interval_steps > 0,
    )


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
        statistics.recording = False
    if measures(run, step):
        for stage in run.engine.stages:
            stage.residuals.begin()
            if stage.mtp is not None:
                stage.mtp.loss_shares.begin()
        if run.probes.channels is not None:
            run.probes.channels.begin()
        if statistics is not None:
            begin_measuring(run, statistics)
    yield
    for stage in run.engine.stages:
        stage.residuals.recording = False
        if stage.mtp is not None:
            stage.mtp.loss_shares.recording = False
    if run.probes.channels is not None:
        run.probes.channels.recording = False
    if statistics is not None:
        statistics.recording = False
    if gemms is not None and checks:
        gemms.recording = False
        run.probes.checked_table = table
        _check(run, gemms, step, table, num_microbatches)


def _check(run: Run, gemms: GemmLedger, step: int, table: PrecisionTable, num_microbatches: int) -> None:
    names = [name for stage in run.engine.stages for name in linears_of(stage)]
    full = run.config.train.recompute is Recompute.full
    local_lines = differences(
        gemms.take(),
        {name: table[name] for name in names},
        num_microbatches=num_microbatches,
        recomputed=[name for name in names if full and name.startswith(("blocks.", "mtp."))],
        uses={info.name: info.uses for info in model_linears(run.config.model)},
    )
    parts = tell_first("\n".join(local_lines), run.mesh.world).values()
    if lines := list(dict.fromkeys(line for part in parts for line in part.splitlines())):
        shown = lines[:MAX_LINES] + ([f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else [])
        raise GemmMismatch(f"step {step}: GEMMs that are not as in the precision table:\n" + "\n".join(shown))
