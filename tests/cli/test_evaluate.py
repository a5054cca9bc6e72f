"""`megatron-fp4 evaluate`: the number that the training's own evaluation gave, in whatever phase the run was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fp4.checkpoint.offline import read_tensor
from megatron_fp4.cli.checkpoint import main as average
from megatron_fp4.cli.compose import load_run_config
from megatron_fp4.cli.trained import evaluate as command
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.launch import Launch
from megatron_fp4.data.shards.shard import token_dtype
from megatron_fp4.data.shards.writer import ShardWriter
from megatron_fp4.inference.precisions import table_of
from megatron_fp4.train.evaluation import sets
from megatron_fp4.train.evaluation.heldout import HeldOutLoss
from megatron_fp4.train.open import open_trained
from megatron_fp4.train.opened import examiner, open_data
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.distributed import run_distributed, world_group
from tests.helpers.letters import make_tokenizer
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

    def evaluate(*arguments: object) -> HeldOutLoss:
        result = right(*arguments)  # type: ignore[arg-type]
        computed.append(result.loss)
        return result

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


def test_the_mean_of_a_window(
    run: TinyRun, losses: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `checkpoint average` makes of a run is evaluated by the run's settings."""
    assert average(["average", str(run.run_dir), "--window", "3", "4", "--to", str(tmp_path / "mean")]) == 0
    mean = tmp_path / "mean" / "step_00000004"
    key = "master/head.weight"
    three, four = (run.state(step)[key].double() for step in (3, 4))
    assert torch.equal(read_tensor(mean, key), ((three + four) / 2).float())
    for arguments in ([], ["--step", "3"], ["--checkpoint", str(tmp_path / "mean")], ["--checkpoint", str(mean)]):
        assert command.main([str(run.run_dir), "--precision", "bf16", *arguments]) == 0
    newest, three_alone, folder, itself = losses
    assert folder == itself
    assert folder not in (newest, three_alone), "the weights are not those of the mean"
    assert average(["average", str(run.run_dir), "--window", "4", "9", "--to", str(tmp_path / "one")]) == 2
    assert "steps 4 to 9 hold 1 checkpoint(s)" in capsys.readouterr().err


def test_the_mean_of_a_run_with_its_tokenizers_vocabulary(
    tmp_path: Path, losses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """The stored configuration says 0; another model is still refused, by the argument that was typed."""
    shard, mean = tmp_path / "shards" / "toy", tmp_path / "mean"
    shard.parent.mkdir()
    writer = ShardWriter(shard, token_dtype(29))
    for first in range(100):
        writer.add_document(np.array([*(2 + (first + np.arange(40)) % 27), 1]))
    writer.close()
    run = tiny_run(
        tmp_path, "model.vocab_size=0", f"data.tokenizer='{make_tokenizer(tmp_path)}'", "train.stop_after_steps=2",
        "train.save_interval_steps=1", f"data.evaluation=[{{name: toy, paths: ['{shard}'], may_overlap: true}}]",
        "train.eval_interval_steps=9",
    )  # fmt: skip
    make_trainer(run.overrides)[0].fit()
    assert average(["average", str(run.run_dir), "--window", "1", "2", "--to", str(mean)]) == 0
    typed = [str(run.run_dir), "--precision", "bf16", "--checkpoint"]
    for checkpoint in (mean, mean / "step_00000002"):
        assert command.main([*typed, str(checkpoint)]) == 0, capsys.readouterr().err
    assert losses[0] == losses[1]
    stored = run.run_dir / "config.yaml"
    stored.write_text(stored.read_text().replace("norm_eps: 1.0e-05", "norm_eps: 1.0e-04"))
    assert command.main([*typed, str(mean)]) == 2
    printed = capsys.readouterr().err
    assert f"error: --checkpoint {mean} holds another model than {run.run_dir}:\n  model.norm_eps: 1e-05 in" in printed


def on_two_ranks(rank: int, world_size: int, run_dir: str, layouts: list[ParallelConfig]) -> list[float]:
    """What each layout says of the held-out set."""
    process = Process(Launch(rank, world_size), world_group(rank, world_size), torch.device("cpu"))
    values: list[float] = []
    for layout in layouts:
        config = replace(load_run_config(Path(run_dir)), parallel=layout)
        trained = open_trained(config, None, process)
        data = open_data(trained.checked, dp_rank=trained.mesh.dp.rank)
        trained.assign(table_of(trained, "same"))
        examined = examiner(trained.checked, trained.engine, data, trained.mesh, trained.device)
        values += [finding.loss for finding in examined.examine(table_of(trained, "same")) if finding.loss is not None]
    return values


def test_no_layout_shows(run: TinyRun, losses: list[float]) -> None:
    """pp 2 and two copies give the number of one process to the bit, tp 2 up to the order of sums in BF16."""
    assert command.main([str(run.run_dir), "--precision", "same"]) == 0
    layouts = [ParallelConfig(tp=2), ParallelConfig(pp=2), ParallelConfig()]
    for tp, pp, copies in run_distributed(on_two_ranks, 2, str(run.run_dir), layouts):
        assert [pp, copies] == losses * 2
        assert tp == pytest.approx(losses[0], rel=1e-4)
