"""After a resume, or a rollback, each step stands once in metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from megatron_fp4.train.telemetry.metrics import METRICS_FILE, JsonlSink, read_metrics
from megatron_fp4.train.telemetry.sinks import TensorBoardSink


def steps_and_losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(folder)]


def test_a_resume_keeps_the_steps_of_its_checkpoint_and_drops_the_later_ones(tmp_path: Path) -> None:
    """A checkpoint of step 3: step 3 is behind it, step 4 is made anew."""
    path = tmp_path / METRICS_FILE
    first = JsonlSink(path, resume_step=0)
    for step in (1, 2, 3, 4, 5):
        first.write(step, {"loss": float(step)})
    first.close()
    second = JsonlSink(path, resume_step=3)
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    second.write(4, {"loss": 40.0})
    second.write(5, {"loss": 50.0})
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    second.rewind(4)
    second.write(5, {"loss": 500.0})
    second.close()
    assert steps_and_losses(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 500.0)]


def test_a_fresh_start_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    JsonlSink(path, resume_step=0).close()
    assert read_metrics(tmp_path) == []


def test_numbers_that_json_has_not_are_text(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / METRICS_FILE, resume_step=0)
    sink.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    sink.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": "nan", "grad_norm": "inf", "lr": 0.5}]


def test_tensorboard_forgets_from_the_step_that_is_made_anew(tmp_path: Path) -> None:
    """`purge_step` is the first step that TensorBoard drops."""
    pytest.importorskip("torch.utils.tensorboard")
    with mock.patch("torch.utils.tensorboard.SummaryWriter") as writer:
        TensorBoardSink(tmp_path, resume_step=3).rewind(4)
    assert [call.kwargs["purge_step"] for call in writer.call_args_list] == [4, 5]
