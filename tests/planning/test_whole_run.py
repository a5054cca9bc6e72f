"""Hours, failures, checkpoints and data of a whole run, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_fp4.checkpoint import CheckpointConfig
from megatron_fp4.data.config import EvaluationConfig
from megatron_fp4.planning.cost.hardware import Assumptions
from megatron_fp4.planning.cost.whole_run import goodput, save_warnings
from megatron_fp4.planning.report import run_plan
from megatron_fp4.train.config import RunConfig
from tests.planning.test_time import twelve


def saving(steps: int, **checkpoint: object) -> RunConfig:
    config = twelve(4, 2, "1f1b", 1536)
    checkpoints = replace(CheckpointConfig(), **checkpoint)  # type: ignore[arg-type]
    return replace(config, train=replace(config.train, save_interval_steps=steps), checkpoint=checkpoints)


def test_the_run_by_hand() -> None:
    config = saving(2000, keep_every_tokens=500_000_000_000, keep_last=4)
    report = run_plan(config, 4096, assumptions=Assumptions(price_per_gpu_hour=2.0))
    run, days = report["whole_run"], report["time"]["days"]["expected"]
    saves = run["saves"]
    assert saves["bytes"] == 12_310_001_152 * 12
    assert run["data_bytes"] == 4 * config.run_tokens
    assert config.run_tokens == pytest.approx(1e13, rel=1e-6)
    assert run["data_index"]["bytes"] == pytest.approx(16 * 1e13 / 1000, rel=1e-6)
    assert saves["kept"] == 4 + 19, "a checkpoint for each whole 500 G of not quite 10 T tokens, and the last four"
    assert saves["seconds_between_failures"] == pytest.approx(54 * 24 * 16384 / 419 / 4096 * 3600)
    assert run["wall_days"] == pytest.approx(days / saves["goodput"])
    assert run["gpu_hours"] == pytest.approx(run["wall_days"] * 24 * 4096)
    assert run["cost"] == pytest.approx(2 * run["gpu_hours"])
    assert run["megawatt_hours"] == pytest.approx(run["gpu_hours"] * 120 / 72 / 1000)
    assert run_plan(config, 4096)["whole_run"]["cost"] is None, "a price is nobody's published figure"


def test_the_best_interval_is_young_and_dalys() -> None:
    saves = run_plan(saving(2000, asynchronous=False), 4096)["whole_run"]["saves"]
    blocking, between = saves["blocking_seconds"], saves["seconds_between_failures"]
    assert blocking == saves["seconds"] == pytest.approx(12.31e9 * 12 / 100e9, rel=1e-3)
    assert saves["best_interval_seconds"] == pytest.approx(math.sqrt(2 * blocking * between))
    best = saves["best_interval_seconds"]
    assert all(goodput(best, blocking, between, 600) > goodput(f * best, blocking, between, 600) for f in (0.8, 1.25))
    assert saves["best_goodput"] == goodput(best, blocking, between, 600)


def test_a_save_interval_far_from_the_best_is_warned_of() -> None:
    """148 GB every 20 to 50 seconds passed unseen; so would an interval of hours."""
    often, well, seldom = (run_plan(saving(steps), 4096)["warnings"] for steps in (100, 2000, 50_000))
    assert [(w["about"], w["severity"]) for w in often if w["about"] == "saves"] == [("saves", "slow")]
    text = next(w["text"] for w in often if w["about"] == "saves")
    assert text.startswith("148 GB are saved every ")
    assert "train.save_interval_steps = 100" in text
    assert not any(w["about"] == "saves" for w in well)
    assert any(w["about"] == "saves" for w in seldom)
    slow = Assumptions(storage_gb_per_second=1.0)
    section = run_plan(saving(100), 4096, assumptions=slow)["whole_run"]
    assert "take 148 s to write" in save_warnings(section)[0]["text"]


def test_evaluation_is_forward_in_bf16() -> None:
    config = saving(2000)
    data = replace(config.data, evaluation=[EvaluationConfig(name="held", paths=["x"], max_tokens=10_000_000)])
    config = replace(config, data=data, train=replace(config.train, eval_interval_steps=1000))
    report = run_plan(config, 4096)
    times = config.total_steps // 1000 + 1
    seconds = times * 1e7 * report["flops"]["forward_per_token"] / (2500e12 * 0.4 * 4096)
    assert report["whole_run"]["evaluation_seconds"] == pytest.approx(seconds)


def test_a_run_of_minutes_is_not_asked_to_save_less_often_than_once() -> None:
    """Its best interval is longer than itself: one save at its end, and no warning whose remedy is what is set."""
    config = saving(0)
    report = run_plan(replace(config, train=replace(config.train, total_tokens=1e9)), 4096)
    saves = report["whole_run"]["saves"]
    assert saves["interval_steps"] == saves["best_interval_steps"] < saves["best_interval_seconds"]
    assert save_warnings(report["whole_run"]) == []


def test_failures_that_leave_hardly_any_progress_are_a_warning() -> None:
    """A restart of 10 minutes, an interruption every 10: no save interval helps. Restarts in no time are allowed."""
    often = Assumptions(failure_gpu_hours=4096 / 6)
    (warning,) = [
        one for one in run_plan(saving(2000), 4096, assumptions=often)["warnings"] if one["about"] == "failures"
    ]
    assert warning["text"].startswith("one every 600 s leaves at best ")
    kept = replace(often, restart_seconds=0.0, save_stop_seconds=0.0)
    assert not any(one["about"] == "failures" for one in run_plan(saving(2000), 4096, assumptions=kept)["warnings"])


def test_a_run_waits_for_saves_that_take_longer_than_their_interval() -> None:
    """148 GB to a file system of 0.1 GB/s take 1477 s: the next save, and the run with it, waits for that."""
    slow = Assumptions(storage_gb_per_second=0.1)
    run = run_plan(saving(100), 4096, assumptions=slow)["whole_run"]
    saves = run["saves"]
    assert saves["interval_seconds"] < saves["seconds"] / 10
    assert run["wall_days"] * 86400 > saves["times"] * saves["seconds"]
