"""A run that is stopped by SIGTERM and resumed is the same run, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_fp4 import pretrain
from megatron_fp4.data.ledger import read_step
from megatron_fp4.train.faults.signals import EXIT_REQUEUE
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    records = [record for record in read_metrics(run_dir) if "loss" in record]
    return {record["step"]: (record["loss"], record["grad_norm"]) for record in records}


def run_here(run: TinyRun, capsys: pytest.CaptureFixture[str], expect: int = 0) -> str:
    """Run to the end in this process, which has imported everything already; returns what was printed."""
    code = pretrain.main(run.overrides)
    printed = capsys.readouterr()
    assert code == expect, f"exit code {code}, expected {expect}:\n{printed.out}{printed.err}"
    return printed.out + printed.err


def stop_by_sigterm(run: TinyRun, num_ranks: int, step: int) -> int:
    """Start the run, send SIGTERM once `step` is logged; returns the step at which it stopped."""
    process = run.start(num_ranks)
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in read_metrics(run.run_dir)):
        assert process.poll() is None, process.stdout.read()[-4000:] if process.stdout else ""
        assert time.monotonic() < deadline, "the run did not reach the step"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_REQUEUE, f"a stop on request must say so by its exit code:\n{output[-4000:]}"
    return max(losses(run.run_dir))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sigterm_and_resume_equal_an_uninterrupted_run(tmp_path: Path, num_ranks: int) -> None:
    whole = tiny_run(tmp_path, f"parallel.tp={num_ranks}")
    whole.run(num_ranks)
    halves = whole.with_overrides(run_dir=tmp_path / "halves")
    stopped = stop_by_sigterm(halves, num_ranks, 20)
    assert 20 <= stopped < 40, "SIGTERM must end the run before its last step"
    output = halves.run(num_ranks)
    assert f"resuming after step {stopped}" in output

    expected, actual = losses(whole.run_dir), losses(halves.run_dir)
    assert sorted(actual) == list(range(1, 41)), "each step must stand once in the metrics"
    assert actual == expected, "resume changed a loss: data order, noise, schedule or state was not restored exactly"
    state, resumed = whole.state(40), halves.state(40)
    assert state.keys() == resumed.keys()
    for key, tensor in state.items():
        assert torch.equal(tensor, resumed[key]), f"{key} differs after the resume"


def test_a_checkpoint_of_tp2_goes_on_at_tp1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the parity of the two layouts over 20 steps: NVFP4 with stochastic rounding, FP32 compute."""
    two = tiny_run(tmp_path, "parallel.tp=2", "train.stop_after_steps=10", "precision.compute_dtype=fp32")
    two.run(2)
    mixed = two.with_overrides("parallel.tp=1", "train.stop_after_steps=20")
    run_here(mixed, capsys)
    single = mixed.with_overrides(run_dir=tmp_path / "single")
    run_here(single, capsys)
    actual, expected = losses(mixed.run_dir), losses(single.run_dir)
    assert sorted(actual) == list(range(1, 21))
    for step in range(1, 21):
        what = "tp=2 computes other numbers than tp=1" if step <= 10 else "the layout change altered the model"
        assert actual[step][0] == pytest.approx(expected[step][0], rel=1e-5), f"step {step}: {what}"


def test_bf16_and_nvfp4_start_from_the_same_model_and_see_the_same_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for recipe in ("bf16", "nvfp4"):
        run = tiny_run(
            tmp_path,
            f"precision={recipe}",
            "train.stop_after_steps=3",
            "optim.lr=1e-12",
            "optim.min_lr=0",
            "optim.weight_decay=0",
        )
        run = run.with_overrides(run_dir=tmp_path / recipe)
        run_here(run, capsys)
        runs.append(run)
    bf16, nvfp4 = runs
    states = [run.state(3) for run in runs]
    for key in states[0]:
        if key.startswith("master/"):
            assert torch.allclose(states[0][key], states[1][key], rtol=0, atol=1e-9), f"{key}: other initial weights"
    hashes = [[read_step(run.run_dir, step).hash for step in (1, 2, 3)] for run in runs]
    assert hashes[0] == hashes[1], "precision changed the batches"
    assert losses(bf16.run_dir)[1] != losses(nvfp4.run_dir)[1], "NVFP4 had no effect"


def test_a_second_launch_into_a_finished_run_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "train.stop_after_steps=3")
    run_here(run, capsys)
    before = losses(run.run_dir)
    run_here(run, capsys)
    assert losses(run.run_dir) == before


def test_resume_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "train.stop_after_steps=2")
    output = run_here(run.with_overrides("train.resume=required"), capsys, expect=2)
    assert "no complete checkpoint" in output
    run_here(run, capsys)
    assert "already holds checkpoint 2" in run_here(run.with_overrides("train.resume=never"), capsys, expect=2)
    output = run_here(run.with_overrides("model.ffn_hidden=128"), capsys, expect=2)
    assert "model.ffn_hidden" in output
    assert "256" in output, "the refusal must name the checkpoint's value"
    output = run_here(run.with_overrides("optim.lr=1e-3", "train.stop_after_steps=3"), capsys)
    assert "optim.lr" in output, "a changed learning rate takes effect and is said"
