"""NaN or Inf on one rank, or nothing to learn: all ranks skip the step, no state changes, and it is said why."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fp4.train.faults.signals import EXIT_FAILED
from megatron_fp4.train.run import TrainingDiverged
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.data.toy import write_shard
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer, masters


def train_with_a_nan(
    rank: int, world_size: int, overrides: list[str], bad_steps: list[int]
) -> tuple[list[str], dict[str, Any], str]:
    """Train; on the last rank the block output is NaN in `bad_steps`. Returns what was printed, the state, and
    why the run gave up, "" if it did not."""
    trainer, console = make_trainer(overrides, rank, world_size)
    run = trainer.run

    def poison(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        bad = rank == world_size - 1 and trainer.position.step + 1 in bad_steps
        return out * float("nan") if bad else out

    run.engine.stages[0].blocks["0"].register_forward_hook(poison)  # type: ignore[union-attr]
    diverged = ""
    try:
        trainer.fit()
    except TrainingDiverged as error:
        diverged = str(error)
    shards = run.optimizer.state_shards()
    state = {f"{kind}/{shard.name}": tensor for shard in shards for kind, tensor in shard.tensors.items()}
    return console.said, state, diverged


def overrides_for(tmp_path: Path, *more: str) -> list[str]:
    every_block = "precision.keep_bf16.last=0"
    return list(tiny_run(tmp_path, "optim.overlap_reduce=always", every_block, *more).overrides)


def test_a_nan_on_one_rank_skips_the_step_everywhere(tmp_path: Path) -> None:
    steps = "train.stop_after_steps=3"
    bad = run_distributed(
        train_with_a_nan, 2, overrides_for(tmp_path, steps, "train.run_dir=" + str(tmp_path / "a")), [3]
    )
    two = "train.stop_after_steps=2"
    good = run_distributed(
        train_with_a_nan, 2, overrides_for(tmp_path, two, "train.run_dir=" + str(tmp_path / "b")), []
    )
    for rank in range(2):
        printed, state, _ = bad[rank]
        message = next(text for text in printed if "skipped on all ranks" in text)
        assert "step 3" in message
        assert "blocks.1.attention.qkv (x, rank 1)" in message, "the first tensor and the rank must be named"
        assert "samples [" in message
        for name, tensor in good[rank][1].items():
            assert torch.equal(state[name], tensor), f"rank {rank}: {name} changed in a skipped step"


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    overrides = overrides_for(tmp_path, "train.max_skipped_steps=2", "train.stop_after_steps=9")
    printed, _, diverged = train_with_a_nan(0, 1, overrides, [2, 4, 5])
    assert diverged
    assert sum("skipped on all ranks" in text for text in printed) == 3, "a good step between resets the count"
    records = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert [record["skipped"] for record in records] == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert [record["skipped_steps"] for record in records] == [0.0, 1.0, 1.0, 2.0, 3.0]


def test_stop_policy_names_the_tensor_on_all_ranks(tmp_path: Path) -> None:
    """They agree before one of them stops: else the others would wait for it in the next collective."""
    settings = overrides_for(tmp_path, "train.nonfinite=stop", "train.stop_after_steps=2")
    reasons = {reason for _, _, reason in run_distributed(train_with_a_nan, 2, settings, [1])}
    assert len(reasons) == 1
    assert re.match(r"step 1: NaN or Inf in blocks\.1\.attention\.qkv \(x, rank 1\), samples \[.*=stop", *reasons)


# -- a step without a target ------------------------------------------------------------------------------------------


def overrides_with_one_token_documents(tmp_path: Path, *more: str) -> list[str]:
    """Step 3 reads documents of one token only; under `reset_documents` no position of it is a target."""
    settings = overrides_for(tmp_path, *more)
    ones = write_shard(tmp_path / "ones", [[7]] * 300)
    toy = f"{{name: toy, paths: ['{tmp_path}/shards/toy'], max_epochs: 0}}"
    tokens = 2 * 4 * 32
    phases = [
        f"{{name: before, tokens: {tokens}, weights: {{toy: 1}}}}",
        f"{{name: none, tokens: {tokens // 2}, weights: {{ones: 1}}}}",
        "{name: after, weights: {toy: 1}}",
    ]
    sources = f"data.sources=[{toy}, {{name: ones, paths: ['{ones}'], max_epochs: 0}}]"
    return [*settings, sources, f"data.phases=[{', '.join(phases)}]", "data.reset_documents=true"]


def test_a_step_without_a_target_changes_no_weight_and_is_said(tmp_path: Path) -> None:
    states = {}
    for stop in (2, 3):
        folder = f"train.run_dir={tmp_path}/to_{stop}"
        trainer, console = make_trainer(
            overrides_with_one_token_documents(tmp_path, f"train.stop_after_steps={stop}", folder)
        )
        assert trainer.fit() == 0
        states[stop] = masters(trainer)
    assert all(torch.equal(tensor, states[3][name]) for name, tensor in states[2].items()), "weights moved by momentum"
    assert trainer.position.skipped_steps == 1
    assert trainer.run.optimizer.step_count == 2
    printed = "step 3: update skipped on all ranks, none of its 4 samples has a target"
    assert printed in console.said
    assert any(text.startswith("step      3/3  loss none  grad norm 0.000") for text in console.said)
    records = {record["step"]: record for record in read_metrics(tmp_path / "to_3") if "lr" in record}
    assert "loss" not in records[3], "a loss of 0.0 would be in every mean"
    assert records[3]["lr"] > 0.0
    assert records[3]["skipped"] == 1.0


def test_data_without_targets_end_the_run(tmp_path: Path) -> None:
    alone = f"data.sources=[{{name: ones, paths: ['{tmp_path}/ones'], max_epochs: 0}}]"
    settings = overrides_with_one_token_documents(tmp_path, "train.max_skipped_steps=2", "train.stop_after_steps=5")
    trainer, _ = make_trainer([*settings, alone, "data.phases=[]"])
    message = r"2 steps in a row .* or no target token, up to step 2"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.fit()
    command = TinyRun(tmp_path, (*settings, alone, "data.phases=[]")).with_overrides(run_dir=tmp_path / "command")
    process = command.start()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == EXIT_FAILED
    assert re.search(f"^error: {message}", printed, re.MULTILINE)
    assert "Traceback" not in printed
