"""What stands for a run's loss, and on which side of another's it is, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fp4.train.telemetry.gaps import gap_percent, last_gap
from megatron_fp4.train.telemetry.series import Curve, RunSeries


def run_of(name: str, losses: list[float]) -> RunSeries:
    """A step is a thousand tokens."""
    steps = {step: {"step": step, "loss": loss, "consumed_tokens": 1e3 * step} for step, loss in enumerate(losses, 1)}
    return RunSeries(Path(name), name, steps)


def test_the_training_loss_is_the_mean_of_twenty_steps() -> None:
    """Of 1 to 50: the last twenty are 31 to 50, their mean 40.5; at the fourth there are only 1 to 4."""
    run = run_of("a", [float(step) for step in range(1, 51)])
    assert run.summary("loss") == 40.5
    smooth = Curve([], run.curve("loss").values).smooth().values
    assert (smooth[3], smooth[19], smooth[20], smooth[49]) == (2.5, 10.5, 11.5, 40.5)


def test_a_higher_loss_is_a_positive_gap() -> None:
    """4.2 against 4.0 is +5 %; the other way round 0.2 of 4.2, -4.76 %."""
    worse, base = run_of("worse", [4.2] * 30), run_of("base", [4.0] * 30)
    gap, back = last_gap(worse, base, "loss"), last_gap(base, worse, "loss")
    assert gap is not None
    assert back is not None
    assert (gap.tokens, gap.percent) == (30e3, pytest.approx(5.0))
    assert back.percent == pytest.approx(-100 / 21)
    assert gap_percent(worse, base).values == pytest.approx([5.0] * 30)


def test_a_median_leaves_out_the_first_step_of_each_launch(tmp_path: Path) -> None:
    """Of steps 2, 3, 5 and 6 the two in the middle take 2 s and 3 s; the slower one has both its time and its rate."""
    times = [90.0, 1.0, 2.0, 80.0, 3.0, 4.0]
    records = [
        {
            "step": step,
            "loss": 2.0,
            "consumed_tokens": 12.0 * step,
            "step_seconds": time,
            "tokens_per_second": 12 / time,
        }
        for step, time in enumerate(times, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    events = [{"event": "start", "step": 0}, {"event": "skip", "step": 1}, {"event": "resume", "step": 3}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    run = RunSeries.read(tmp_path)
    assert (run.summary("step_seconds"), run.summary("tokens_per_second")) == (3.0, 4.0)
    assert run.num_smoothed == 6
