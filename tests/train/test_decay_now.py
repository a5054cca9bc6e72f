"""`train.decay_from=now`: the learning rate decays from the next step on, and every resume goes on with that decay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, load_run_config, to_run_config
from megatron_fp4.pretrain import main
from megatron_fp4.train.checked import check_config, settle_decay
from megatron_fp4.train.faults.rollback import RECORD, RollbackRecord
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run

STEP_TOKENS = 4 * 32
NOW = "train.decay_from=now"
TO_STEP_12 = f"train.total_tokens={12 * STEP_TOKENS}"


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Four steps of 40, at the peak of the learning rate."""
    run = tiny_run(
        tmp_path_factory.mktemp("decay"),
        "model.num_layers=1",
        "precision.keep_bf16={first: 0, last: 0}",
        "optim.min_lr=0",
    )
    train(run, 4)
    return run


def train(run: TinyRun, stop: int, *overrides: str) -> None:
    assert main([*run.overrides, f"train.stop_after_steps={stop}", "checkpoint.keep_last=9", *overrides]) == 0


def branch(stable: TinyRun, name: str) -> TinyRun:
    run_dir = stable.run_dir.with_name(name)
    shutil.copytree(stable.run_dir, run_dir)
    return stable.with_overrides(run_dir=run_dir)


def steps(run: TinyRun) -> dict[int, tuple[float, float, float]]:
    return {r["step"]: (r["lr"], r["loss"], r["grad_norm"]) for r in read_metrics(run.run_dir) if "loss" in r}


def test_the_decay_begins_at_the_next_step_and_every_resume_goes_on_with_it(
    stable: TinyRun, capfd: pytest.CaptureFixture[str]
) -> None:
    """In NVFP4, with a switch at the decay: precision follows the decay to where it is."""
    settings = (NOW, TO_STEP_12, "precision.switch=[{at_decay: true, gemms: [fprop]}]")
    whole, pieces = branch(stable, "whole"), branch(stable, "pieces")
    train(whole, 12, *settings)
    out = capfd.readouterr().out
    assert "decay from 512 on, over the last 1,024 (train.decay_from), to 0.00e+00" in out
    assert "from 512 consumed tokens on:" in out, "the switch at the decay did not follow it"
    train(pieces, 6, *settings)
    train(pieces, 9, *settings)
    train(pieces, 12, *settings)
    rates = {step: rate for step, (rate, _, _) in steps(whole).items()}
    assert [rates[step] for step in (1, 2, 3, 4)] == [3e-3] * 4
    assert [rates[step] for step in range(5, 13)] == pytest.approx([3e-3 * (12 - n) / 8 for n in range(5, 13)])
    assert steps(pieces) == steps(whole), "a resume began the decay anew, or left it"
    state = pieces.state(12)
    for key, tensor in whole.state(12).items():
        assert torch.equal(tensor, state[key]), f"{key} differs after two resumes within the decay"
    assert load_run_config(pieces.run_dir).train.decay_from == "512", "config.yaml says from when on"

    capfd.readouterr()
    train(pieces, 13, TO_STEP_12.replace(str(12 * STEP_TOKENS), "5120"))
    assert steps(pieces)[13][0] == 3e-3, "without the setting the run is back in its own schedule"


def test_a_number_is_the_same_as_now(stable: TinyRun) -> None:
    now, number = branch(stable, "now"), branch(stable, "number")
    train(now, 6, NOW)
    train(number, 6, "train.decay_from=512")
    assert steps(now) == steps(number)
    assert steps(now)[5][0] == pytest.approx(3e-3 * 35 / 36)


def test_a_rollback_before_the_decay_does_not_move_it(stable: TinyRun) -> None:
    """Killed after a rollback to checkpoint 4 of a decay that began at step 6."""
    run = branch(stable, "rolled_back")
    RollbackRecord(4, [[20, 24]], 1, decay_from=str(6 * STEP_TOKENS)).write(run.run_dir)
    assert json.loads((run.run_dir / RECORD).read_text())["decay_from"] == "768"
    train(run, 8, NOW)
    rates = {step: rate for step, (rate, _, _) in steps(run).items()}
    assert rates[6] == 3e-3 > rates[7]


def test_what_cannot_decay_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "precision=bf16")

    def refusal(*overrides: str, samples: int = 16) -> str:
        try:
            config = to_run_config(compose_config([*run.overrides, *overrides]))
            settle_decay(check_config(config, 1), "", samples)
        except ValueError as error:
            return str(error)
        return ""

    assert "train.decay_from = 'soon', must be now, a whole number" in refusal("train.decay_from=soon")
    assert "optim.schedule=cosine has no last phase" in refusal(NOW, "optim.schedule=cosine")
    assert "begins at token 512, must be between the 1000 of optim.warmup_tokens" in refusal(
        NOW, "optim.warmup_tokens=1000"
    )
    assert "train.decay_from=5120 leaves no step to decay: the run ends at 5120 tokens" in refusal(NOW, samples=160)
    assert "begins at token 6000, must be between the 0 of optim.warmup_tokens and the 5120" in refusal(
        "train.decay_from=6000"
    )
