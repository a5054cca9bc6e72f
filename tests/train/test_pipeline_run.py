"""A whole run on two pipeline stages: training, evaluation and checkpoints are those of one process. It
predicts two further tokens, whose losses are metrics of their own."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.helpers.tiny_run import TinyRun, tiny_run

COMMON = (
    "precision.compute_dtype=fp32",
    "model.num_layers=4",
    "model.tied_embeddings=true",
    "model.mtp={depth: 2, pattern: '*-', shared: true}",
    "train.total_tokens=768",
    "train.eval_interval_steps=3",
    "train.save_interval_steps=3",
    "train.statistics_interval_steps=3",
)


def metrics(run: TinyRun, key: str) -> list[float]:
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [row[key] for row in map(json.loads, lines) if key in row]


def test_pipeline_run_equals_one_process_and_resumes_on_it(tmp_path: Path) -> None:
    shard = tmp_path / "shards" / "toy"
    evaluation = f"data.evaluation=[{{name: toy, paths: ['{shard}'], max_tokens: 300, may_overlap: true}}]"
    one = tiny_run(tmp_path, *COMMON, evaluation)
    piped = one.with_overrides("parallel.pp=2", "parallel.schedule=interleaved_1f1b", run_dir=tmp_path / "piped")
    one.run()
    piped.with_overrides("train.stop_after_steps=3").run(2)
    for name, tensor in one.state(3).items():
        assert torch.allclose(piped.state(3)[name], tensor, rtol=1e-5, atol=1e-7), f"checkpoint differs in {name}"
    piped.with_overrides("train.resume=required", "parallel.pp=1", "parallel.schedule=1f1b").run()
    keys = ["loss", "grad_norm", "eval/toy/loss", "residual/blocks.0/rms", "residual/blocks.3/rms"]
    for key in (*keys, "mtp_1_loss", "mtp_2_loss"):
        ours, theirs = metrics(piped, key), metrics(one, key)
        assert len(ours) == len(theirs) > 0, f"{key}: written {len(ours)} times instead of {len(theirs)}"
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), rtol=1e-6), f"{key}: {ours} != {theirs}"


def test_microbatches_that_do_not_fit_end_a_run_before_it_starts(tmp_path: Path) -> None:
    """Exit code 2 and the rule with its numbers, before any process group is made."""
    run = tiny_run(tmp_path, "parallel.pp=2", "parallel.schedule=dualpipev", "model.num_layers=4")
    output = run.run(2, expect=2)
    assert "dualpipev needs at least as many microbatches as stages" in output
    assert "got 2 microbatches" in output
