"""Gradients of several precisions on equal weights and batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.studies.gradients import gradient_errors
from tests.helpers.tiny_run import tiny_run

PRECISIONS = {
    "bf16": ["precision=bf16"],
    "same": ["precision=bf16", "optim.lr=2e-3"],
    "nvfp4": ["precision/recipe=nvfp4"],
    "no_sr": ["precision/recipe=nvfp4_no_sr"],
    "backward": ["precision/recipe=nvfp4_sr_backward", "precision.rules=[{match: '*', use: nvfp4, fprop: bf16}]"],
}


def test_errors_of_precisions(tmp_path: Path) -> None:
    """A run's own gradient has no error; nearest rounding leaves all of it in a mean; SR of the backward pass averages
    out, which it does not where the forward pass decides."""
    run = tiny_run(tmp_path)
    arms = {arm: to_run_config(compose_config([*run.overrides, *settings])) for arm, settings in PRECISIONS.items()}
    errors = gradient_errors(arms, draws=3)
    assert "bf16" not in errors
    assert (errors["same"].error, errors["same"].bias) == (0.0, 0.0)
    assert errors["same"].cosine == pytest.approx(1.0, abs=1e-12)
    assert errors["no_sr"].bias == pytest.approx(1.0, abs=1e-9)
    assert 0.001 < errors["nvfp4"].error < 0.2
    assert errors["backward"].error < errors["nvfp4"].error
    assert errors["backward"].bias == pytest.approx(1 / 3, abs=0.15)
    assert errors["same"].loss == errors["same"].reference_loss == errors["backward"].loss != errors["nvfp4"].loss
    assert not list(tmp_path.glob("**/metrics.jsonl"))  # nothing was trained
