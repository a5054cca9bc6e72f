"""Quantization statistics of a training step: how well each operand of each linear survives its format.

One idea: a backend that wraps another one sees every tensor on its way to a GEMM, and the operands that it becomes. On
a step that is due, the first microbatch's tensors are measured by the pure functions of `precision.statistics`; the
wrapped backend gets the same calls as ever, so the numbers of the run do not change.

Statistics are those of the rank's part of a tensor; the ranks with tensor, context and data coordinate 0 report theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.precision.backends import Backend, Copy, NonFiniteError, Prepared, Source
from megatron_fp4.precision.statistics import QuantizationStats, quantization_stats, report_table
from megatron_fp4.train.telemetry.metrics import Metrics

Report = dict[str, QuantizationStats]
"""`blocks.3.mlp.up/fprop.x` -> statistics."""

FOLDER = "quantization"
LOGGED = ("snr_db", "underflow", "saturation")
"""What goes to the metrics, per linear and operand; the table has everything."""


class StatisticsProbe:
    """A `Backend` that measures the tensors which pass to the backend `inner`, while `recording`."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.recording = False
        self.report: Report = {}
        """What was measured since the last `take`."""
        self._seen: set[tuple[str, str]] = set()

    def quantize(self, x: Tensor, source: Source, copies: Sequence[Copy]) -> tuple[Prepared, ...]:
        """See `Backend.quantize`."""
        if self.recording:
            self._measure(x, source, copies)
        return self.inner.quantize(x, source, copies)

    def matmul(
        self, a: Prepared, b: Prepared, *, out_dtype: torch.dtype, accumulate_into: Tensor | None = None
    ) -> Tensor:
        """See `Backend.matmul`."""
        return self.inner.matmul(a, b, out_dtype=out_dtype, accumulate_into=accumulate_into)

    def take(self) -> Report:
        """What was measured since the last call."""
        report, self.report, self._seen = self.report, {}, set()
        return report

    def _measure(self, x: Tensor, source: Source, copies: Sequence[Copy]) -> None:
        if (source.name, source.operand) in self._seen:  # a later microbatch, or recomputation
            return
        self._seen.add((source.name, source.operand))
        known = set()
        for copy in copies:
            operand = copy.operand
            if not operand.quantized or (operand.transposes and operand in known):  # the same codes, transposed
                continue
            known.add(operand)
            try:
                stats = quantization_stats(x.detach(), operand, along=copy.along, step=source.step)
            except NonFiniteError:  # the run's own rule for NaN and Inf decides what happens
                continue
            self.report[f"{source.name}/{copy.gemm}.{source.operand}"] = stats


def gather(report: Report, mesh: ParallelMesh) -> Report:
    """The reports of all pipeline stages, in order of the blocks. Collective over the world."""
    mine = report if mesh.tp.rank == mesh.cp.rank == mesh.dp.rank == 0 else {}
    merged: Report = {}
    for part in all_gather_object(mine, mesh.world):
        merged |= part
    return dict(sorted(merged.items(), key=lambda item: _order(item[0])))


def write(report: Report, step: int, run_dir: Path, metrics: Metrics) -> None:
    """The table `quantization/step_00000100.txt` in the run directory, and a few scalars per linear to the metrics."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / f"step_{step:08}.txt").write_text(report_table(report.items()) + "\n")
    values = {f"{FOLDER}/{name}/{field}": getattr(stats, field) for name, stats in report.items() for field in LOGGED}
    metrics.write(step, values)


def _order(name: str) -> tuple[int, str]:
    first, _, rest = name.partition(".")
    return (int(rest.split(".")[0]), name) if first == "blocks" else (1 << 30, name)
