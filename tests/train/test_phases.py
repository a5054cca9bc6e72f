"""The seconds of a step: by the host's clock, by the device's events, and what lies between two steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megatron_fp4.train.evaluation import sets as evaluation_sets
from megatron_fp4.train.evaluation.heldout import HeldOutLoss
from megatron_fp4.train.phases import DeviceEvent, DeviceTimer, Phases
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import TrainerInProcess, make_trainer


class StandInDevice:
    """A device that works for a second on whatever it is given, far behind the host."""

    def __init__(self) -> None:
        self.given = 0
        self.done = 0
        self.num_events = 0

    def new_event(self) -> DeviceEvent:
        self.num_events += 1
        return StandInEvent(self)


class StandInEvent:
    def __init__(self, device: StandInDevice) -> None:
        self.device = device
        self.at = -1

    def record(self) -> None:
        self.at = self.device.given

    def query(self) -> bool:
        return self.device.done >= self.at

    def elapsed_time(self, end_event: StandInEvent, /) -> float:
        assert self.query(), "CUDA refuses events that were not passed"
        assert end_event.query(), "CUDA refuses events that were not passed"
        return 1e3 * (end_event.at - self.at)


def a_step(timer: DeviceTimer, device: StandInDevice, step: int, forward: int) -> None:
    timer.begin(step)
    for phase, work in (
        ("between", 1),
        ("data", 0),
        ("assign", 2),
        ("forward_backward", forward),
        ("forward_backward", 1),  # a beat, for the watchdog
        ("agree", 0),
        ("update", 3),
        ("count", 0),
        ("log", 5),
    ):
        timer.enter(phase)
        device.given += work


def test_seconds_of_the_device_are_those_of_the_step_before() -> None:
    device = StandInDevice()
    timer = DeviceTimer(device.new_event)
    a_step(timer, device, 7, forward=10)
    assert timer.previous_step() == {}, "nothing was waited for"
    a_step(timer, device, 8, forward=20)
    assert timer.previous_step() == {}, "the device is behind, and is not waited for"
    device.done = device.given - 5
    expected = {"data": 0.0, "assign": 2.0, "forward_backward": 11.0, "agree": 0.0, "update": 3.0}
    assert timer.previous_step() == expected
    a_step(timer, device, 9, forward=30)
    device.done = device.given
    assert timer.previous_step() == {**expected, "forward_backward": 21.0}
    a_step(timer, device, 6, forward=1)
    assert timer.previous_step() == {}, "the step before was undone by a rollback"
    assert device.num_events == 4 * 8, "a beat needs no event"


def test_a_cpu_needs_no_events() -> None:
    phases = Phases(torch.device("cpu"))
    phases.begin(1)
    assert phases.timer is None


def trained(tmp_path: Path) -> TrainerInProcess:
    sets = f"[{{name: toy, paths: ['{tmp_path}/shards/toy'], max_tokens: 64, may_overlap: true}}]"
    run = tiny_run(
        tmp_path, "precision=bf16", "train.stop_after_steps=4", f"data.evaluation={sets}", "train.eval_interval_steps=2"
    )
    return make_trainer(run.overrides)[0]


def test_an_evaluation_counts_in_the_wall_clock_of_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path)

    def evaluate(*_: object) -> HeldOutLoss:
        time.sleep(0.5)
        return HeldOutLoss(1.0)

    monkeypatch.setattr(evaluation_sets, "evaluate", evaluate)
    trainer.fit()
    records = {r["step"]: r for r in read_metrics(tmp_path / "run") if "loss" in r}
    beside = {step: record["wall_seconds"] - record["step_seconds"] for step, record in records.items()}
    assert beside[3] > 0.5 > max(beside[2], beside[4])
    assert beside[1] > 0, "the start-up of a launch counts in its first step"
    for record in records.values():
        assert record["goodput"] == pytest.approx(record["step_seconds"] / record["wall_seconds"])
        assert record["wall_tokens_per_second"] == pytest.approx(128 / record["wall_seconds"])
    assert records[4]["wall_time"] - records[2]["wall_time"] == pytest.approx(
        records[3]["wall_seconds"] + records[4]["wall_seconds"], abs=0.05
    )


def test_seconds_of_the_device_are_logged_with_their_step(tmp_path: Path) -> None:
    trainer, device = trained(tmp_path), StandInDevice()
    trainer.run.phases.timer = DeviceTimer(device.new_event)
    device.done = 10**9
    trainer.fit()
    records = [r for r in read_metrics(tmp_path / "run") if "device/forward_backward_seconds" in r]
    assert [record["step"] for record in records] == [1, 2, 3], "the last one is not waited for"
