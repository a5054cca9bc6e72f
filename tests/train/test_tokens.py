"""What the ranks are fed: the same tokens on all ranks of a data shard, the same held-out batches at every call."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4.train.evaluation.heldout import evaluate
from megatron_fp4.train.message import TokensDifferError
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import make_trainer


def other_tokens_on_one_rank(rank: int, world_size: int, overrides: list[str]) -> str:
    trainer, _ = make_trainer(overrides, rank, world_size)
    right = trainer.run.loader.batch

    def batch(first: int, number: int):  # type: ignore[no-untyped-def]
        return right(first + 4 * rank * (first >= 8), number)

    trainer.run.loader.batch = batch  # type: ignore[method-assign]
    with pytest.raises(TokensDifferError) as error:
        trainer.fit()
    return f"after step {trainer.position.step}: {error.value}"


@pytest.mark.parametrize("layout", ["tp", "pp"])
def test_ranks_with_other_tokens_end_the_run_before_the_update(tmp_path: Path, layout: str) -> None:
    """From the third step on rank 1 reads other samples: all ranks say so, and no update is made from them."""
    run = tiny_run(tmp_path, f"parallel.{layout}=2", "precision=bf16", "checkpoint.asynchronous=false")
    printed = run_distributed(other_tokens_on_one_rank, 2, list(run.overrides))
    assert printed[0] == printed[1]
    assert printed[0].startswith("after step 2: data shard 0: 1 of its 2 ranks were fed other tokens")


def test_two_evaluations_of_frozen_weights_are_bit_equal(tmp_path: Path) -> None:
    """Of two named sets, with steps of training data read in between."""
    shard = tmp_path / "shards" / "toy"
    sets = f"[{{name: a, paths: ['{shard}'], max_tokens: 300}}, {{name: b, paths: ['{shard}'], max_tokens: 77}}]"
    run = tiny_run(tmp_path, f"data.evaluation={sets}", "train.stop_after_steps=2", "train.eval_interval_steps=2")
    trainer, _ = make_trainer(run.overrides)
    trainer.fit()
    (logged,) = [record for record in read_metrics(run.run_dir) if "eval/a/loss" in record]
    inner, table = trainer.run, trainer.run.plan.evaluation_table()
    for loader in inner.examiner.evaluations:
        inner.loader.batch(40, 4)
        loss = evaluate(inner.engine, loader, table, inner.mesh, inner.device).loss
        if loader.name == "a":
            assert loss == logged["eval/a/loss"]
        assert loss == evaluate(inner.engine, loader, table, inner.mesh, inner.device).loss
    assert [loader.name for loader in inner.examiner.evaluations] == ["a", "b"]


def test_the_time_waited_for_data_is_logged(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "train.stop_after_steps=3", "precision=bf16", "data.prefetch_batches=0")
    make_trainer(run.overrides)[0].fit()
    records = [record for record in read_metrics(run.run_dir) if "loss" in record]
    assert all(0 < record["data_wait_seconds"] < record["step_seconds"] for record in records)
