"""SIGKILL of a rank in mid-run: every rank ends, and the resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_run import tiny_run
from tests.train.resume.test_resume import losses

STEPS = 14
EXPERTS = ("model.num_layers=3", "model.pattern='*E*'", "model.moe.num_experts=4", "model.moe.ffn_hidden=32")
SHORT = (f"train.stop_after_steps={STEPS}", "train.save_interval_steps=4", "checkpoint.keep_last=9")


@pytest.mark.parametrize(("axis", "phase"), [("tp", "forward_backward"), ("dp", "save")])
def test_sigkill_of_one_rank_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, axis: str, phase: str) -> None:
    """At tp 2 in the forward pass of step 10; at dp 2 when the save after step 8 begins."""
    whole = tiny_run(tmp_path, f"parallel.{axis}=2", *SHORT)
    whole.run(2)
    monkeypatch.setenv("MEGATRON_FP4_MODULE", "tests.train.faults.faulty")
    monkeypatch.setenv("TEST_FAULT", f"killed,1,{10 if axis == 'tp' else 8},{phase}")
    broken = whole.with_overrides(run_dir=tmp_path / "broken")
    process, began = broken.start(2), time.monotonic()
    output, _ = process.communicate(timeout=100)
    assert process.returncode not in (0, 85), f"a killed rank must fail the job:\n{output[-3000:]}"
    assert time.monotonic() - began < 60, "the other rank waited for its time-out"
    monkeypatch.delenv("TEST_FAULT")
    saved = 8 if axis == "tp" else 4
    assert f"resuming after step {saved}" in broken.run(2)
    expected, actual = losses(whole.run_dir), losses(broken.run_dir)
    assert sorted(actual) == list(range(1, STEPS + 1)), "each step must stand once, the latest attempt wins"
    assert actual == expected, "the resumed run is another run"
    state, resumed = whole.state(STEPS), broken.state(STEPS)
    different = [key for key, tensor in state.items() if not torch.equal(tensor, resumed[key])]
    assert not different, f"differ after the resume: {different[:5]}"


def test_sigkill_leaves_nobody_waiting_for_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass of step 2, whose first messages are those between the ranks that share the experts."""
    monkeypatch.setenv("MEGATRON_FP4_MODULE", "tests.train.faults.faulty")
    monkeypatch.setenv("TEST_FAULT", "killed,1,2,forward_backward")
    run = tiny_run(tmp_path, "parallel.dp=2", "parallel.ep=2", *EXPERTS, *SHORT)
    began = time.monotonic()
    process = run.start(2)
    output, _ = process.communicate(timeout=100)
    assert process.returncode not in (0, 85), f"a killed rank must fail the job:\n{output[-3000:]}"
    assert time.monotonic() - began < 60, "the other rank waited for its time-out"
    assert "row_exchange" in output, f"the other rank was not on its way to the experts:\n{output[-3000:]}"
