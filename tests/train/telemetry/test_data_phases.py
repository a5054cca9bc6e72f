"""The step at which the blend changes is said once, and is in metrics and ledger."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run, write_toy_shard
from tests.train.in_process import make_trainer


def phased_run(folder: Path) -> TinyRun:
    """Ten steps of four samples of 32 tokens; the late phase begins at token 600: sample 19, the last one of step 5."""
    other = write_toy_shard(folder / "shards" / "other", seed=1)
    run = tiny_run(folder, "train.stop_after_steps=10", "precision=bf16", "checkpoint.asynchronous=false")
    sources = f"[{{name: toy, paths: ['{folder}/shards/toy'], max_epochs: 0}}, {{name: other, paths: ['{other}']}}]"
    phases = "[{name: early, tokens: 600, weights: {toy: 3, other: 1}}, {name: late, weights: {toy: 1}}]"
    return run.with_overrides(f"data.sources={sources}", f"data.phases={phases}")


def test_a_change_of_phase_is_said_once_and_logged(tmp_path: Path) -> None:
    run = phased_run(tmp_path)
    trainer, console = make_trainer(run.overrides)
    trainer.fit()
    assert [text for text in console.said if "data phase" in text] == [
        "step 1: data phase 'early' from token 0 on: toy 0.75, other 0.25",
        "step 5: data phase 'late' from token 608 on: toy 1, other 0",
    ]
    records = [record for record in read_metrics(run.run_dir) if "loss" in record]
    assert [record["data_phase"] for record in records] == [0.0] * 4 + [1.0] * 6
    lines = [json.loads(line) for line in (run.run_dir / "ledger.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines if "hash" in line] == ["early"] * 4 + ["late"] * 6


def test_a_resume_says_the_phase_it_is_in_and_a_changed_blend_is_a_new_one(tmp_path: Path) -> None:
    run = phased_run(tmp_path)
    make_trainer((*run.overrides, "train.stop_after_steps=7"))[0].fit()
    trainer, console = make_trainer((*run.overrides, "train.stop_after_steps=8"))
    trainer.fit()
    assert [text for text in console.said if "data phase" in text] == [
        "step 8: data phase 'late' from token 608 on: toy 1, other 0"
    ]
    changed = "data.phases=[{name: other, weights: {toy: 1, other: 1}}]"
    trainer, console = make_trainer((*run.overrides, changed, "train.resume_allow=[data.*]"))
    trainer.fit()
    assert [text for text in console.said if "data phase" in text] == [
        "step 9: data phase 'other' from token 1,024 on: toy 0.5, other 0.5"
    ]


def test_a_single_blend_says_nothing(tmp_path: Path) -> None:
    trainer, console = make_trainer(tiny_run(tmp_path, "train.stop_after_steps=1", "precision=bf16").overrides)
    trainer.fit()
    assert not [text for text in console.said if "data phase" in text]
