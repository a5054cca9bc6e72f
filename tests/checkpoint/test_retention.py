"""Retention as a pure function."""

from __future__ import annotations

import pytest

from megatron_fp4.checkpoint.config import CheckpointConfig
from megatron_fp4.checkpoint.retention import KeptStep, steps_to_delete


def test_keep_last() -> None:
    saved = [KeptStep(step) for step in (3, 1, 2, 4)]
    assert steps_to_delete(saved, 4, CheckpointConfig(keep_last=3)) == [1]


def test_milestones_stay_as_the_run_goes_on() -> None:
    """Decided anew after each save, a milestone must be the same one each time."""
    config = CheckpointConfig(keep_last=1, keep_every_tokens=100)
    kept: list[KeptStep] = []
    for step in range(1, 41):
        kept.append(KeptStep(step, tokens=step * 30))
        gone = steps_to_delete(kept, step, config)
        kept = [one for one in kept if one.step not in gone]
    assert [one.tokens for one in kept] == [120, 210, 300, 420, 510, 600, 720, 810, 900, 1020, 1110, 1200]


def test_best_by_score_ignores_unscored_and_nan() -> None:
    saved = [KeptStep(1, score=2.0), KeptStep(2, score=float("nan")), KeptStep(3), KeptStep(4, score=3.0), KeptStep(5)]
    assert steps_to_delete(saved, 5, CheckpointConfig(keep_last=1, keep_best=1)) == [2, 3, 4]


def test_checkpoints_of_an_abandoned_future_do_not_push_out_the_present() -> None:
    """After a rollback to 50 without discard, 90 and 100 must not count as the last two."""
    saved = [KeptStep(step) for step in (50, 55, 60, 90, 100)]
    assert steps_to_delete(saved, 60, CheckpointConfig(keep_last=2)) == [50]


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"keep_last": 0}, "keep_last"), ({"keep_best": -1}, "keep_best"), ({"timeout_seconds": 0.0}, "timeout_seconds")],
)
def test_impossible_settings_are_refused(settings: dict, name: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.{name}"):
        CheckpointConfig(**settings)
