"""NaN or Inf on one rank: the step is skipped on all ranks, no state changes, and the message says where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fp4.train.run import TrainingDiverged
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import make_trainer


def train_with_a_nan(
    rank: int, world_size: int, overrides: list[str], bad_steps: list[int]
) -> tuple[list[str], dict[str, Any], bool]:
    """Train; on the last rank the block output is NaN in `bad_steps`. Returns what was said, the state, and
    whether the run gave up."""
    trainer, console = make_trainer(overrides, rank, world_size)
    run = trainer.run

    def poison(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        bad = rank == world_size - 1 and trainer.position.step + 1 in bad_steps
        return out * float("nan") if bad else out

    run.engine.stages[0].blocks["0"].register_forward_hook(poison)  # type: ignore[union-attr]
    diverged = False
    try:
        trainer.fit()
    except TrainingDiverged:
        diverged = True
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
        said, state, _ = bad[rank]
        message = next(text for text in said if "skipped on all ranks" in text)
        assert "step 3" in message
        assert "blocks.1.attention.qkv (x, rank 1)" in message, "the first tensor and the rank must be named"
        assert "samples [" in message
        for name, tensor in good[rank][1].items():
            assert torch.equal(state[name], tensor), f"rank {rank}: {name} changed in a skipped step"


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    overrides = overrides_for(tmp_path, "train.max_skipped_steps=2", "train.stop_after_steps=9")
    said, _, diverged = train_with_a_nan(0, 1, overrides, [2, 4, 5])
    assert diverged
    assert sum("skipped on all ranks" in text for text in said) == 3, "a good step between resets the count"
    records = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert [record["skipped"] for record in records] == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert [record["skipped_steps"] for record in records] == [0.0, 1.0, 1.0, 2.0, 3.0]


def test_stop_policy_names_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"blocks\.1\.attention\.qkv: operand x"):
        train_with_a_nan(0, 1, overrides_for(tmp_path, "train.nonfinite=stop", "train.stop_after_steps=2"), [1])
