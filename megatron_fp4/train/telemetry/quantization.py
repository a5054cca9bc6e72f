"""Where the quantization statistics of a training step go: a table in the run directory, a few scalars to the metrics.

Statistics are those of the rank's part of a tensor; the ranks with tensor, context and data coordinate 0 report theirs.

Not here: how a tensor is measured (precision/statistics.py), and when (probes.py).
"""

from __future__ import annotations

from pathlib import Path

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.precision.statistics import Report, report_table
from megatron_fp4.train.telemetry.metrics import Metrics

FOLDER = "quantization"
LOGGED = ("snr_db", "underflow", "saturation")
"""What goes to the metrics, per linear and operand; the table has everything."""


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
