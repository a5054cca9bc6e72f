"""A batch-size ramp: every step has the ramp's samples, and nothing else about the run depends on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.data.ledger import read_step, reopen, replay
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import RecordingConsole, falsify_loss, make_trainer, masters

RAMP = (
    "train.batch_ramp.start_samples=2",
    "train.batch_ramp.increment_samples=2",
    "train.batch_ramp.ramp_samples=18",
    "train.global_batch=8",
    f"train.total_tokens={58 * 32}",
    "optim.schedule=cosine",
    "optim.warmup_tokens=400",
    "optim.min_lr=0",
    "checkpoint.asynchronous=false",
    "precision=bf16",
)
SIZES = [2, 2, 2, 4, 4, 6, 8, 8, 8, 8]
"""Intervals end at samples 6, 12 and 18; the step that begins at 14 has 6 samples; 6 of 58 samples are left over."""
FIRSTS = [sum(SIZES[:step]) for step in range(len(SIZES))]


def train(run: TinyRun, *overrides: str) -> tuple[dict[int, dict[str, Any]], RecordingConsole, dict[str, torch.Tensor]]:
    trainer, console = make_trainer((*run.overrides, *overrides))
    assert trainer.fit() == 0
    records = {record["step"]: record for record in read_metrics(run.run_dir) if "loss" in record}
    return records, console, masters(trainer)


def numbers(records: dict[int, dict[str, Any]]) -> dict[int, tuple[float, ...]]:
    return {step: tuple(r[key] for key in ("loss", "grad_norm", "lr")) for step, r in records.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, Any]:
    """The ramped run without a stop."""
    run = tiny_run(tmp_path_factory.mktemp("whole"), *RAMP)
    return run, train(run)


def test_steps_are_the_ramps_and_schedules_go_by_tokens(whole: tuple[TinyRun, Any]) -> None:
    run, (records, console, _) = whole
    assert [record["batch_samples"] for record in records.values()] == SIZES
    assert [record["consumed_tokens"] for record in records.values()] == [
        32 * (first + size) for first, size in zip(FIRSTS, SIZES, strict=True)
    ]
    assert records[4]["lr"] == pytest.approx(3e-3 * 10 * 32 / 400), "the warm-up must count tokens, not steps"
    assert records[10]["lr"] == 0.0, "the schedule must end with the last whole step of the ramp"
    assert [text for text in console.said if "samples a step" in text] == [
        "step 4: 4 samples a step from here on (2 before), 2 microbatches per rank",
        "step 6: 6 samples a step from here on (4 before), 3 microbatches per rank",
        "step 7: 8 samples a step from here on (6 before), 4 microbatches per rank",
    ]
    seen = []
    for step, (first, size) in enumerate(zip(FIRSTS, SIZES, strict=True), 1):
        logged = read_step(run.run_dir, step)
        assert (logged.first_sample, logged.num_samples) == (first, size)
        seen += replay(reopen(logged.start), logged).sample_ids.tolist()  # ValueError if the hash is another
    assert seen == list(range(52)), "the ramp repeated, lost or reordered samples"


def test_a_ramped_run_is_the_run_of_its_batch_sizes_one_after_the_other(tmp_path: Path) -> None:
    """Gradients are divided by the step's own targets, whatever it is called: constant batches, changed at resumes."""
    constant = (*RAMP, "optim.schedule=constant", "optim.warmup_tokens=0")
    records, _, weights = train(tiny_run(tmp_path, *constant))
    pieces = tiny_run(tmp_path, *constant, "train.batch_ramp.start_samples=0", "train.batch_ramp.increment_samples=0")
    pieces = pieces.with_overrides("train.batch_ramp.ramp_samples=0", run_dir=tmp_path / "pieces")
    for size, last in ((2, 3), (4, 5), (6, 6), (8, 0)):
        resumed_records, _, end = train(pieces, f"train.global_batch={size}", f"train.stop_after_steps={last}")
    assert numbers(resumed_records) == numbers(records), (
        "a step of the ramp computes other numbers than one of its size"
    )
    for name, tensor in weights.items():
        assert torch.equal(tensor, end[name]), name


@pytest.mark.parametrize("stop", [2, 3, 5, 8])
def test_resume_inside_at_and_after_the_ramp_is_bit_equal(
    tmp_path: Path, whole: tuple[TinyRun, Any], stop: int
) -> None:
    """Steps 4, 6 and 7 begin a size: stops within one (2), where the next one does (3, 5) and after the ramp (8)."""
    run, (records, _, weights) = whole
    halves = run.with_overrides(run_dir=tmp_path / "halves")
    train(halves, f"train.stop_after_steps={stop}")
    resumed_records, console, resumed = train(halves)
    assert numbers(resumed_records) == numbers(records)
    assert not [text for text in console.said if f"step {stop + 1}: " in text and "before" in text]
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_rollback_inside_the_ramp_skips_the_steps_own_samples(tmp_path: Path) -> None:
    """Step 6 (samples 14 to 19) spikes: back to checkpoint 4 (10 samples), 10 to 19 are never delivered again."""
    spikes = ("train.spikes.ratio=1.5", "train.spikes.window_steps=4", "train.spikes.min_steps=2")
    run = tiny_run(tmp_path, *RAMP, *spikes, "train.spikes.max_skips=0", "train.save_interval_steps=4")
    trainer, _ = make_trainer(run.overrides)
    falsify_loss(trainer, lambda: 10.0 if trainer.position.samples == 14 and not trainer.run.loader.plan.skip else 1.0)
    trainer.fit()
    assert trainer.run.loader.plan.skip == [(10, 20)]
    report = json.loads((run.run_dir / "spikes" / "step_00000006" / "report.json").read_text())
    assert [sample["sample_id"] for sample in report["samples"]] == list(range(14, 20))
    records = [record for record in read_metrics(run.run_dir) if "loss" in record]
    assert [record["batch_samples"] for record in records] == SIZES, "the ramp counts delivered samples"
    assert read_step(run.run_dir, 5).first_sample == 10
