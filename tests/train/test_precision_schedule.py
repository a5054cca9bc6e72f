"""Precision in time: switches at their step, resumes in any phase, evaluation of its own, changes that are said."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_fp4 import pretrain
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.optim import learning_rate
from megatron_fp4.precision.ledger import GemmMismatch
from megatron_fp4.train import step as step_module
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run

STEP_TOKENS = 4 * 32
BACKWARD = "dgrad dy nvfp4 sr, w nvfp4 16x16 | wgrad dy nvfp4 sr rht16, x nvfp4 rht16"


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A run in this process installs its handlers."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def train(run: TinyRun, steps: int) -> None:
    """Up to step `steps`, in this process."""
    assert pretrain.main([*run.overrides, f"train.stop_after_steps={steps}"]) == 0


def losses(run: TinyRun) -> dict[int, tuple[float, float]]:
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_metrics(run.run_dir) if "loss" in r}


def switch(step: int, settings: str = "gemms: [fprop]") -> str:
    """A switch that holds from `step` (1-based) on."""
    return f"{{at_tokens: {(step - 1) * STEP_TOKENS}, {settings}}}"


def assert_same_run(expected: TinyRun, actual: TinyRun, steps: range, why: str) -> None:
    left, right = losses(expected), losses(actual)
    for step in steps:
        assert left[step] == right[step], f"step {step}: {why}"
    last = steps[-1]
    states = expected.state(last), actual.state(last)
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[0].items():
        assert torch.equal(tensor, states[1][key]), f"{key} after step {last}: {why}"


def test_a_switch_holds_from_exactly_its_step(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    unswitched = tiny_run(tmp_path)
    switched = unswitched.with_overrides(
        f"precision.switch=[{switch(4)}]", "train.check_gemms=true", run_dir=tmp_path / "s"
    )
    train(unswitched, 5)
    capfd.readouterr()
    train(switched, 5)
    output = capfd.readouterr().out
    expected, actual = losses(unswitched), losses(switched)
    assert [expected[step] == actual[step] for step in (1, 2, 3)] == [True] * 3, "the switch came early"
    assert expected[4] != actual[4], "the switch came late: Fprop of step 4 must be in BF16"
    change = "blocks.0.attention.qkv: fprop x nvfp4, w nvfp4 16x16 -> fprop x bf16, w bf16"
    assert f"from 384 consumed tokens on:\n{change}" in output
    after = output[output.index("step 4: precision changes") :].splitlines()
    assert after[1] == change
    assert any(line.lstrip().startswith("step      4/5") for line in after), "it is said before the step"


@pytest.mark.parametrize(("fraction", "start"), [(0.2, 4096), (0.25, 3840), (0.0999, 4609)])
def test_a_switch_at_the_decay_holds_from_its_first_token(tmp_path: Path, fraction: float, start: int) -> None:
    """Of 5,120 tokens; 0.0999 of them are 511.488, rounded 511. The rate falls behind that token, not before."""
    run = tiny_run(tmp_path, "precision.switch=[{at_decay: true}]", f"optim.decay_fraction={fraction}")
    checked = check_config(to_run_config(compose_config(run.overrides)), 1)
    assert [tokens for tokens, _ in checked.plan.phases] == [0, start]
    assert (checked.plan.phase_at(start - 1), checked.plan.phase_at(start)) == (0, 1)
    rates = [learning_rate(checked.config.optim, start + more, 5120) for more in (0, 1)]
    assert rates[0] == checked.config.optim.lr > rates[1]


def test_after_the_switch_the_run_is_a_fresh_process_in_the_new_precision(tmp_path: Path) -> None:
    """Nothing of the old precision stays behind: no cached weight, no saved operand, no shifted noise."""
    switched = tiny_run(tmp_path, f"precision.switch=[{switch(4)}]", "train.save_interval_steps=3")
    train(switched, 6)
    rules = "precision.rules=[{match: '*', use: nvfp4, fprop: bf16}]"
    fresh = tiny_run(tmp_path, rules, "train.stop_after_steps=6")
    fresh = fresh.with_overrides(run_dir=tmp_path / "fresh")
    name = "step_00000003"
    shutil.copytree(switched.run_dir / "checkpoints" / name, fresh.run_dir / "checkpoints" / name)
    output = fresh.run()  # another process
    assert "resuming after step 3" in output
    assert_same_run(switched, fresh, range(4, 7), "the switch left something of the old precision behind")


def test_resume_lands_in_the_right_phase(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Stops within each of three phases and exactly between two of them."""
    switches = f"precision.switch=[{switch(3)}, {switch(6, 'use: bf16')}]"
    whole = tiny_run(tmp_path, switches, "train.check_gemms=true")
    train(whole, 8)
    pieces = whole.with_overrides(run_dir=tmp_path / "pieces")
    outputs = {}
    for stop in (1, 4, 5, 7, 8):
        capfd.readouterr()
        train(pieces, stop)
        outputs[stop] = capfd.readouterr().out
    assert_same_run(whole, pieces, range(1, 9), "a resume computes in another precision than the run without it")
    printed = [stop for stop, text in outputs.items() if "precision differs from the checkpoint's" in text]
    assert printed == [7], "only the resume from step 5, between two phases, starts in another precision"
    assert f"blocks.0.mlp.down: fprop x bf16, w bf16 | {BACKWARD} -> bf16" in outputs[7]
    assert "step 3: precision changes" in outputs[4], "the resume from step 1 goes through the switch at step 3"


def test_precision_may_change_on_resume_and_it_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path)
    train(run, 2)
    capfd.readouterr()
    train(run.with_overrides("precision=bf16"), 3)
    output = capfd.readouterr().out
    assert "precision.use" in output, "the changed settings are listed"
    text = output[output.index("precision differs from the checkpoint's") :].splitlines()
    assert text[1] == f"blocks.0.attention.qkv: fprop x nvfp4, w nvfp4 16x16 | {BACKWARD} -> bf16"
    assert len(text[1:]) >= 4, "all four linears of block 0"


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_sr_weights"])
def test_evaluation_computes_in_its_own_precision(tmp_path: Path, recipe: str) -> None:
    """With weights that are rounded stochastically, those of an evaluation must not serve the next step."""

    def evaluated(name: str, precision: str) -> TinyRun:
        sets = f"data.evaluation=[{{name: toy, paths: ['{tmp_path}/shards/toy'], max_tokens: 512, may_overlap: true}}]"
        settings = (f"precision/recipe={recipe}", f"precision.evaluation={precision}", "train.eval_interval_steps=2")
        run = tiny_run(tmp_path, sets, *settings)
        run = run.with_overrides(run_dir=tmp_path / name)
        train(run, 4)
        return run

    high, same = evaluated("high", "bf16"), evaluated("same", "same")
    assert_same_run(high, same, range(1, 5), "evaluation changed the training: its precision was not taken back")
    evaluated_losses = [
        [r["eval/toy/loss"] for r in read_metrics(run.run_dir) if "eval/toy/loss" in r] for run in (high, same)
    ]
    assert len(evaluated_losses[0]) == len(evaluated_losses[1]) == 2
    assert evaluated_losses[0] != evaluated_losses[1], "precision.evaluation has no effect"


def test_a_precision_that_is_not_assigned_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.check_gemms` looks at what is executed, not at what was configured."""
    assign, calls = step_module.assign_precision, []

    def only_once(*arguments: object) -> None:
        if not calls:
            assign(*arguments)  # type: ignore[arg-type]
        calls.append(arguments)

    monkeypatch.setattr(step_module, "assign_precision", only_once)
    run = tiny_run(tmp_path, f"precision.switch=[{switch(2)}]", "train.check_gemms=true")
    with pytest.raises(GemmMismatch, match=r"step 2: GEMMs that are not as in the precision table") as caught:
        train(run, 3)
    extra = "blocks.0.mlp.up fprop x nvfp4, w nvfp4 16x16: executed 2 times, not in the table"
    assert extra in str(caught.value)
