"""A run of hours that saves at its end only is warned of, with a proposal, once its pace is known."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_fp4.checkpoint import CheckpointConfig
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.telemetry.operator import unsaved
from megatron_fp4.train.telemetry.operator.unsaved import UnsavedWatch


@pytest.mark.parametrize(("seconds_per_step", "save_interval", "warned"), [(4.5, 0, 1), (0.5, 0, 0), (4.5, 100, 0)])
def test_only_a_long_run_without_saves(
    seconds_per_step: float, save_interval: int, warned: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,000 steps: 75 minutes, or 8."""
    clock = iter(range(1000))
    monkeypatch.setattr(unsaved.time, "monotonic", lambda: seconds_per_step * 20 * next(clock))  # asked at 1 and 21
    config = RunConfig(train=TrainConfig(global_batch=1, save_interval_steps=save_interval))
    config = replace(config, train=replace(config.train, total_tokens=1000 * config.data.seq_length))
    watch = UnsavedWatch(config)
    texts = [text for step in range(1, 100) if (text := watch.warning(step, step))]
    assert len(texts) == warned
    if warned:
        assert "the only save of this run is at its end, in 1.2 h at 4.5 s a step" in texts[0]
        assert "train.save_interval_steps=400 saves every 30 min" in texts[0]


def test_a_run_whose_saves_fail_again_and_again_ends() -> None:
    assert CheckpointConfig().max_failures == 3, "by default it would train for weeks without a checkpoint"
