"""`megatron-fp4 verify-resume` passes for what is right, and finds a state that does not come back."""

from __future__ import annotations

import pytest

from megatron_fp4.cli import verify_resume
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.optim import Zero1AdamW
from megatron_fp4.proofs import resume
from megatron_fp4.proofs.parity import Case
from megatron_fp4.proofs.resume import Stretch, StretchReport, run_stretch

TINY = ["model=gpt_tiny", "model.num_layers=2", "--layout", "dp2", "--others", "dp1", "--steps", "2"]


RAMP = [f"train.batch_ramp.{name}_samples={value}" for name, value in (("start", 4), ("increment", 4), ("ramp", 100))]


def test_a_right_resume_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """With a batch-size ramp, so that the steps after the kill are larger than those before."""
    assert verify_resume.main([*TINY, "precision=nvfp4", *RAMP]) == 0
    out = capsys.readouterr().out
    assert out.count("equal bit for bit") >= 3, "fp32, bf16 and the recipe at the same layout"
    assert "fp32    dp2 killed, resumed at dp1" in out
    assert "batch-size ramp: steps of 4, 4, 8, 12 samples" in out


def forgets_moments(process: Process, case: Case, parallel: ParallelConfig, stretch: Stretch) -> StretchReport:
    """A resume whose second moments start from zero."""
    right = Zero1AdamW.after_load

    def after_load(self: Zero1AdamW, step_count: int) -> None:
        for shard in self.state_shards():
            shard.tensors["exp_avg_sq"].zero_()
        right(self, step_count)

    Zero1AdamW.after_load = after_load  # type: ignore[method-assign]
    return run_stretch(process, case, parallel, stretch)


def test_a_state_that_does_not_come_back_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "run_stretch", forgets_moments)
    assert verify_resume.main([*TINY, "precision=bf16"]) == 1
    out = capsys.readouterr().out
    assert "fp32    dp2 killed, resumed at dp2           FAILED" in out
    assert "exp_avg_sq" in out


def test_what_cannot_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_resume.main(["model=gpt_tiny", "--layout", "tp0"]) == 2
    assert "tp0" in capsys.readouterr().err
