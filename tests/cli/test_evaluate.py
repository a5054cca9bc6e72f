"""`megatron-fp4 evaluate`: the number that the training's own evaluation gave, in whatever phase the run was."""

from __future__ import annotations

import pytest

from megatron_fp4.cli.trained import evaluate as command
from megatron_fp4.train.evaluation import sets
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Four steps, the MLPs in BF16 in the fourth. Weights are rounded stochastically, with the noise of the step."""
    folder = tmp_path_factory.mktemp("switched")
    sets = f"[{{name: toy, paths: ['{folder}/shards/toy'], max_tokens: 512, may_overlap: true}}]"
    run = tiny_run(
        folder, "precision/recipe=nvfp4_sr_weights", "precision.evaluation=same", f"data.evaluation={sets}",
        "precision.switch=[{at_fraction: 0.075, gemms: [fprop], match: '*.mlp.*'}]", "train.eval_interval_steps=1",
        "train.save_interval_steps=1", "train.stop_after_steps=4", "checkpoint.keep_last=4",
    )  # fmt: skip
    make_trainer(run.overrides)[0].fit()
    return run


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the command computed, all digits."""
    right, computed = sets.evaluate, []

    def evaluate(*arguments: object) -> float:
        computed.append(right(*arguments))  # type: ignore[arg-type]
        return computed[-1]

    monkeypatch.setattr(sets, "evaluate", evaluate)
    return computed


@pytest.mark.parametrize("step", [3, 4], ids=["before the switch", "behind it"])
def test_same_is_the_precision_of_the_last_step(step: int, run: TinyRun, losses: list[float]) -> None:
    """The table at the start gives another number behind the switch; so does the table of the next step before it."""
    arguments = [str(run.run_dir), "--precision", "same", "--precision", "bf16", "--step", str(step)]
    assert command.main(arguments) == 0
    (logged,) = [r["eval/toy/loss"] for r in read_metrics(run.run_dir) if r["step"] == step and "eval/toy/loss" in r]
    assert losses[0] == logged
    assert losses[1] != logged


def test_a_recipe_that_is_not_there_is_refused_first(
    run: TinyRun, losses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(run.run_dir), "--precision", "bf16", "--precision", "fp3"]) == 2
    assert "precision recipe 'fp3' does not exist" in capsys.readouterr().err
    assert losses == [], "the time of an evaluation was lost before the refusal"
