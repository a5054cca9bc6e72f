"""`megatron-fp4 verify-resume` passes for what is right, and finds a state that does not come back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.cli import verify_resume
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.bootstrap import Launch, Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.optim import Zero1Optimizer
from megatron_fp4.precision import WeightCache
from megatron_fp4.precision.backends import Copy
from megatron_fp4.proofs import resume
from megatron_fp4.proofs.layouts import parse_layout
from megatron_fp4.proofs.parity import Case
from megatron_fp4.proofs.resume import Stretch, StretchReport, run_stretch
from megatron_fp4.proofs.shrink import shrink
from tests.helpers.distributed import world_group

TINY = ["model=gpt_tiny", "model.num_layers=2", "--layout", "dp2", "--others", "dp1", "--steps", "2"]


RAMP = [f"train.batch_ramp.{name}_samples={value}" for name, value in (("start", 4), ("increment", 4), ("ramp", 100))]


def test_a_right_resume_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """With a batch-size ramp, so that the steps after the kill are larger than those before."""
    assert verify_resume.main([*TINY, "precision=nvfp4", *RAMP]) == 0
    out = capsys.readouterr().out
    assert out.count("equal bit for bit") >= 3, "fp32, bf16 and the recipe at the same layout"
    assert "fp32    dp2 killed, resumed at dp1" in out
    assert "batch-size ramp: steps of 4, 4, 8, 12 samples" in out


def forgets_the_step(self: WeightCache, weight: Tensor, copies: Sequence[Copy], **about: Any) -> tuple[Any, ...]:
    """A cache that goes by the version of the weights alone."""
    for copy in copies:
        if (about["version"], copy) not in self._operands:
            origin = about["sharding"].w(about["seed"], about["step"])
            self._operands[about["version"], copy] = about["backend"].quantize(weight.detach(), origin, [copy])[0]
    return tuple(self._operands[about["version"], copy] for copy in copies)


@pytest.mark.parametrize("planted", [False, True], ids=["", "a cache without the step"])
def test_evaluations_between_steps_are_part_of_it(
    planted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are rounded stochastically: those that an evaluation has kept must not serve the next step."""
    settings = ["model=gpt_tiny", "model.num_layers=2", "precision/recipe=nvfp4_sr_weights"]
    config = to_run_config(compose_config([*settings, "train.eval_interval_steps=2"]))
    case = shrink(config, [parse_layout("dp1")])[-1]
    process = Process(Launch(0, 1), world_group(0, 1), torch.device("cpu"))
    if planted:
        monkeypatch.setattr(WeightCache, "get", forgets_the_step)
    whole, resumed = (run_stretch(process, case, ParallelConfig(), Stretch(str(tmp_path), 2, 4)) for _ in range(2))
    assert (whole.began, resumed.began) == (0, 2)
    assert resume.distance([whole], [resumed]).equal is not planted


def forgets_moments(process: Process, case: Case, parallel: ParallelConfig, stretch: Stretch) -> StretchReport:
    """A resume whose second moments start from zero."""
    right = Zero1Optimizer.after_load

    def after_load(self: Zero1Optimizer, step_count: int) -> None:
        for shard in self.state_shards():
            shard.tensors["exp_avg_sq"].zero_()
        right(self, step_count)

    Zero1Optimizer.after_load = after_load  # type: ignore[method-assign]
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
