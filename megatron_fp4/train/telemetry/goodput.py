"""What a run made of the time that went by: tokens by the clock, and the part of the time that was spent in steps.

tokens/s and MFU are of the steps alone. Beside them stand evaluations, saves, logging and start-up (`wall_seconds` of a
step reach back to the end of the one before, in the first step of a launch to its start), and between launches the
scheduler's queue and steps that are made a second time. The file holds each step once, as it was made last, so what its
times leave uncovered is exactly that.

Not here: the rates of one step (throughput.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fp4.train.telemetry.series import RunSeries


@dataclass(frozen=True)
class Goodput:
    """From the start of the first launch to the end of the newest step, and parts of that time, 0 to 1.

    in_steps: the goodput; skipped steps count, and so do first steps of launches, which compile (in_first_steps).
    beside_steps: evaluation, saves, logging, start-up. between_launches: nothing ran, or ran steps that were lost and
    made again. In, beside and between add up to 1.
    """

    seconds: float
    tokens_per_second: float
    in_steps: float
    in_first_steps: float
    beside_steps: float
    between_launches: float


def goodput_of(run: RunSeries) -> Goodput | None:
    """None for a run whose records have no times (it was begun by an older version)."""
    steps = [values for values in run.steps.values() if "consumed_tokens" in values]
    if not all({"wall_time", "wall_seconds", "step_seconds", "tokens_per_second"} <= values.keys() for values in steps):
        return None
    first, last = steps[0], steps[-1]
    seconds = last["wall_time"] - (first["wall_time"] - first["wall_seconds"])
    if seconds <= 0:
        return None
    before = first["consumed_tokens"] - first["tokens_per_second"] * first["step_seconds"]
    in_steps, launched = (sum(values[key] for values in steps) / seconds for key in ("step_seconds", "wall_seconds"))
    firsts = sum(run.steps[step].get("step_seconds", 0.0) for step in run.launched & run.steps.keys()) / seconds
    tokens = last["consumed_tokens"] - before
    return Goodput(seconds, tokens / seconds, in_steps, firsts, launched - in_steps, max(0.0, 1.0 - launched))
