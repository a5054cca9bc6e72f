"""FP4 health of a step, on the steps whose operands are measured: to the metrics, to a table, and a line for people.

    health/blocks.3.mlp.up/zeros         part of the weight gradient that is exactly zero
    .../structural, .../underflow        of these: zero in BF16 too, and zero because an operand was rounded to nothing
    .../fprop, .../dgrad, .../wgrad      the latter, by the GEMM where it happened; which linear's: the table says
    .../dead_inputs, .../dead_outputs    part of the channels of x and of dy that are zero for every token
    .../lost_columns, .../lost_rows      part of the channels within 16x16 weight tiles that round to zero there
    .../scale_floor                      part of the E4M3 scales that are zero or the smallest, of the worst operand
    health/zeros, health/underflow       of all linears together
    head_gradient/loss, .../mtp_1, ...   part of each loss in the gradient that the head gets, where there are several

`health/step_N.txt` in the run's directory has all numbers of all linears.

Not here: how they are counted (zeros.py), the rule that helps (`megatron-fp4 health`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.models.loss_shares import loss_shares
from megatron_fp4.train.run import Run
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.telemetry.monitors.zeros import LinearHealth, linear_health
from megatron_fp4.train.telemetry.quantization import measures

FOLDER = "health"
HEAD = "head_gradient"
WORTH_SAYING = 0.01
"""Part of a weight gradient that underflow may take before the console says so."""


class HealthMonitor:
    """Follows the steps of an attempt. Methods are collective over the world."""

    def __init__(self, run: Run, metrics: Metrics, console: Console) -> None:
        self._run = run
        self._metrics = metrics
        self._console = console
        self._said = ""

    def end(self, step: int) -> None:
        """A step has ended: write what was watched of it, if it was."""
        run = self._run
        if not measures(run, step):
            return
        self._write_loss_shares(step)
        if run.probes.channels is None:
            return
        linears = linear_health(
            run.config.model, run.engine.stages, run.probes.channels, run.optimizer, run.mesh, run.device
        )
        self._metrics.write(step, health_values(linears))
        self._say_worst(step, linears)
        if run.mesh.is_main:
            folder = Path(run.config.train.run_dir) / FOLDER
            folder.mkdir(exist_ok=True)
            (folder / f"step_{step:08}.txt").write_text(health_table(linears))

    def _write_loss_shares(self, step: int) -> None:
        run = self._run
        if depth := run.config.model.mtp.depth:
            probes = [stage.mtp.loss_shares for stage in run.engine.stages if stage.mtp is not None]
            names = ["loss", *(f"mtp_{number}" for number in range(1, depth + 1))]
            shares = loss_shares(probes, len(names), run.mesh.world, run.device)
            self._metrics.write(step, {f"{HEAD}/{name}": share for name, share in zip(names, shares, strict=True)})

    def _say_worst(self, step: int, linears: Sequence[LinearHealth]) -> None:
        """A line where underflow takes much of a gradient, once until it is another linear."""
        worst = max(linears, key=lambda one: one.underflow / one.numel)
        name = worst.name if worst.underflow > WORTH_SAYING * worst.numel else ""
        if name and name != self._said:
            makers = worst.makers()
            origins = ", ".join(f"{count / worst.numel:.1%} by {gemm} of {maker}" for (maker, gemm), count in makers)
            self._console.say(
                f"step {step}: underflow makes {worst.underflow / worst.numel:.1%} of the weight gradient of {name}"
                f" exactly zero ({origins}); after a save, megatron-fp4 health {self._run.config.train.run_dir} says"
                " what helps"
            )
        self._said = name


def health_values(linears: Sequence[LinearHealth]) -> dict[str, float]:
    """The metrics of a step."""
    total = sum(one.numel for one in linears)
    values = {
        f"{FOLDER}/zeros": sum(one.zeros for one in linears) / total,
        f"{FOLDER}/underflow": sum(one.underflow for one in linears) / total,
    }
    for one in linears:
        parts = ("zeros", "structural", "underflow", "fprop", "dgrad", "wgrad")
        of_linear = {part: getattr(one, part) / one.numel for part in parts}
        of_linear |= {"dead_inputs": one.dead_inputs, "dead_outputs": one.dead_outputs}
        if one.floors:
            of_linear |= {"lost_columns": one.lost_columns, "lost_rows": one.lost_rows}
            of_linear["scale_floor"] = max(one.floors.values())
        values |= {f"{FOLDER}/{one.name}/{key}": value for key, value in of_linear.items()}
    return values


def health_table(linears: Sequence[LinearHealth]) -> str:
    """A line per linear, widest problem last in the line: parts in percent, spreads in powers of two."""
    head = ("zeros", "structural", "fprop", "dgrad", "wgrad", "dead x", "dead dy", "lost cols", "lost rows")
    lines = [f"{'linear':34}" + "".join(f"{name:>11}" for name in (*head, "spread cols", "spread rows")) + "  floors"]
    for one in linears:
        counts = (one.zeros, one.structural, one.fprop, one.dgrad, one.wgrad)
        parts = [count / one.numel for count in counts]
        parts += [one.dead_inputs, one.dead_outputs, one.lost_columns, one.lost_rows]
        cells = "".join(f"{part:11.3%}" for part in parts)
        floors = " ".join(f"{operand}={part:.3%}" for operand, part in one.floors.items() if part)
        lines.append(f"{one.name:34}{cells}{one.spread_columns:11.2f}{one.spread_rows:11.2f}  {floors}".rstrip())
    return "\n".join(lines) + "\n"
