"""What may look at a training step without changing it: the GEMM ledger and the quantization statistics.

One idea: both are backends that wrap the run's backend, so they see what the linears really do, under any pipeline
schedule or recomputation. They record only inside `watching`, on the steps that are due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.ledger import GemmLedger, GemmMismatch, differences
from megatron_fp4.precision.statistics import Report, StatisticsProbe
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.telemetry import quantization as statistics
from megatron_fp4.train.telemetry.metrics import Metrics

MAX_LINES = 20


class Observers:
    """Wraps the run's backend as `train.check_gemms`, `train.statistics_interval_steps` and `train.spikes` ask.

    backend: what the linears use.
    """

    def __init__(self, config: TrainConfig, backend: Backend, mesh: ParallelMesh) -> None:
        self._config, self._mesh = config, mesh
        self._probe: StatisticsProbe | None = None
        self._ledger: GemmLedger | None = None
        self._checked: PrecisionTable | None = None
        if config.statistics_interval_steps or config.spikes.enabled:
            backend = self._probe = StatisticsProbe(backend)
        if config.check_gemms:
            backend = self._ledger = GemmLedger(backend)
        self.backend = backend

    @contextmanager
    def watching(
        self, step: int, table: PrecisionTable, stages: Sequence[nn.Module], num_microbatches: int
    ) -> Iterator[None]:
        """Around forward and backward of `step` (1-based). Collective on a step whose GEMMs are checked: the first one
        under `table`. Raises GemmMismatch on all ranks if one of them executed other GEMMs.
        """
        checks = self._ledger is not None and table is not self._checked
        if self._ledger is not None:
            self._ledger.recording = checks
        if self._probe is not None:
            self._probe.recording = self._due(step)
        yield
        if self._probe is not None:
            self._probe.recording = False
        if self._ledger is not None and checks:
            self._ledger.recording, self._checked = False, table
            self._check(self._ledger, step, table, stages, num_microbatches)

    def write_statistics(self, step: int, metrics: Metrics) -> None:
        """Write what was measured during `step`, if it was due. Collective over the world."""
        if self._probe is None or not self._due(step):
            return
        report = statistics.gather(self._probe.take(), self._mesh)
        if report and self._mesh.is_main:
            statistics.write(report, step, Path(self._config.run_dir), metrics)

    def measure(self, step: int, again: Callable[[], object]) -> Report:
        """Statistics of a step that turned out to be bad. again: makes its forward and backward once more, which is not
        needed on a step that was due. Empty where nothing is quantized. Collective over the world.
        """
        if self._probe is None:
            return {}
        if self._due(step):
            return statistics.gather(self._probe.report, self._mesh)
        self._probe.recording = True
        again()
        self._probe.recording = False
        return statistics.gather(self._probe.take(), self._mesh)

    def _due(self, step: int) -> bool:
        interval = self._config.statistics_interval_steps
        return interval > 0 and step % interval == 0

    def _check(
        self, ledger: GemmLedger, step: int, table: PrecisionTable, stages: Sequence[nn.Module], num_microbatches: int
    ) -> None:
        names = [name for stage in stages for name in linears_of(stage)]
        full = self._config.recompute is Recompute.full
        mine = differences(
            ledger.take(),
            {name: table[name] for name in names},
            num_microbatches=num_microbatches,
            recomputed=[name for name in names if full and name.startswith("blocks.")],
        )
        lines = list(dict.fromkeys(line for part in all_gather_object(mine, self._mesh.world) for line in part))
        if lines:
            shown = lines[:MAX_LINES] + ([f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else [])
            raise GemmMismatch(f"step {step}: GEMMs that are not as in the precision table:\n" + "\n".join(shown))
