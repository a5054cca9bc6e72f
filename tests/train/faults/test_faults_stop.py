"""A request to stop that reaches one rank only: all ranks agree on the step, save once, leave with the same code."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from megatron_fp4.train.faults.signals import EXIT_REQUEUE
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.faults.test_faults_hang import outputs, start_ranks

ENDLESS = ("train.total_tokens=1e8", "precision=bf16")


def saved_steps(run: TinyRun) -> list[int]:
    return [record["step"] for record in read_metrics(run.run_dir) if "save/failed" in record]


@pytest.mark.parametrize(("axis", "number"), [("tp", signal.SIGTERM), ("dp", signal.SIGUSR1)])
def test_a_signal_to_one_rank_stops_all(tmp_path: Path, axis: str, number: signal.Signals) -> None:
    run = tiny_run(tmp_path, *ENDLESS, f"parallel.{axis}=2")
    processes = start_ranks(run, 2, "")
    deadline = time.monotonic() + 120
    while not any(record["step"] >= 3 for record in read_metrics(run.run_dir)):
        assert time.monotonic() < deadline, "the run did not reach the step"
        time.sleep(0.05)
    processes[1].send_signal(number)
    first, second = outputs(processes)
    assert [process.returncode for process in processes] == [EXIT_REQUEUE] * 2, first[-2000:] + second[-2000:]
    last = max(record["step"] for record in read_metrics(run.run_dir) if "loss" in record)
    assert saved_steps(run) == [last], "all ranks must save once, at the step on which they agreed"
    assert f"stopped on request (another rank) after step {last}" in first


def test_the_time_limit_of_the_run(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, *ENDLESS, "train.exit_after_seconds=1")
    output = run.run(expect=EXIT_REQUEUE)
    (step,) = saved_steps(run)
    assert f"stopped on request (train.exit_after_seconds) after step {step}" in output
    assert f"resuming after step {step}" in run.run(expect=EXIT_REQUEUE), "the limit counts anew for each attempt"
