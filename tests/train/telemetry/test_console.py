"""What a line of progress says is still to come."""

from __future__ import annotations

import time

import pytest

from megatron_fp4.train.telemetry.console import Console, format_seconds

VALUES = {"loss": 2.5, "grad_norm": 0.125, "lr": 3e-4, "tokens_per_second": 12345.6}


def test_the_eta_of_a_resumed_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """From step 100 to 1000: the first step compiles for 300 s and does not count; ten steps in 50 s are 5 s a step,
    and after step 111 there are 889 left: 4445 s are 1:14:05."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    console = Console(enabled=True, interval_steps=1)
    console.start(100, 1000)
    for step, seconds in ((101, 300.0), (111, 50.0), (121, 50.0), (1000, 4395.0)):
        clock[0] += seconds
        console.step(step, VALUES)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "step    111/1000  loss 2.5000  grad norm 0.125  lr 3.00e-04  12,346 tokens/s  ETA 1:14:05"
    etas = [line.rpartition("ETA ")[2] for line in lines]
    assert etas == ["-", "1:14:05", "1:13:15", "0:00"], "nothing is known, 889 * 5 s, 879 * 5 s, and nothing"


def test_the_eta_of_a_single_step(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=True, interval_steps=10)
    console.start(4, 5)
    console.step(5, VALUES)
    assert capsys.readouterr().out.endswith("ETA 0:00\n")


def test_lines_at_the_interval_and_for_the_first_and_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(enabled=True, interval_steps=4)
    console.start(2, 11)
    for step in range(3, 12):
        console.step(step, VALUES)
    steps = [int(line.split()[1].partition("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert steps == [3, 4, 8, 11]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (123, "2:03"), (3599.6, "1:00:00"), (3723, "1:02:03")],
)
def test_seconds_as_text(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
