"""`megatron-fp4 checkpoint rewind`: back by hand, nothing deleted, and the run then made is the one made at first."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_fp4.checkpoint.directory import complete_steps
from megatron_fp4.cli.checkpoint import main
from megatron_fp4.data.ledger import read_step
from megatron_fp4.storage.lock import RunLock
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.tiny_run import TinyRun, tiny_run
from tests.train.in_process import make_trainer


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    """Checkpoints 2, 4, 6 and 8."""
    run = tiny_run(
        tmp_path, "precision=bf16", "model.num_layers=1", "train.save_interval_steps=2", "checkpoint.keep_last=9",
        "train.stop_after_steps=8",
    )  # fmt: skip
    make_trainer(run.overrides)[0].fit()
    return run


def losses(run: TinyRun) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run.run_dir) if "loss" in record}


def test_rewind_and_go_on(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    first, state = losses(run), run.state(8)
    assert main(["rewind", str(run.run_dir), "4"]) == 0
    out = capsys.readouterr().out
    aside = run.run_dir / "checkpoints" / "set_aside_001"
    assert "the next start goes on from checkpoint 4 (before: 8)" in out
    assert f"set aside, with the metrics until now: {aside}" in out
    assert "it reads samples 16 to 31 again; to leave them out, add [16,32] to data.skip: 'data.skip=[[16,32]]'" in out
    assert complete_steps(aside) == [6, 8], "later checkpoints are set aside, not deleted"
    assert complete_steps(run.run_dir / "checkpoints") == [2, 4]
    assert sorted(losses(run)) == [1, 2, 3, 4], "records of later steps are dropped as a resume drops them"
    assert (aside / "metrics.jsonl").read_text().count('"loss"') == 8
    event = json.loads((run.run_dir / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["step"]) == ("rewind", 4)

    trainer, _ = make_trainer(run.overrides)
    assert trainer.start.position.step == 4
    trainer.fit()
    assert losses(run) == first
    for key, tensor in run.state(8).items():
        assert torch.equal(tensor, state[key]), f"{key}: the steps after a rewind are not those made at first"
    assert complete_steps(aside) == [6, 8], "a later save must not clean up what was set aside"


def test_other_samples_after_a_rewind(run: TinyRun) -> None:
    assert main(["rewind", str(run.run_dir), "4"]) == 0
    make_trainer([*run.overrides, "data.skip=[[16,32]]"])[0].fit()
    assert read_step(run.run_dir, 5).first_sample == 16
    assert losses(run).keys() == set(range(1, 9))
    assert main(["rewind", str(run.run_dir), "2"]) == 0
    assert complete_steps(run.run_dir / "checkpoints" / "set_aside_002") == [4, 6, 8]


def test_what_cannot_be_rewound(run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewind", str(run.run_dir), "5"]) == 2
    assert "no complete checkpoint of step 5; those of steps 2, 4, 6, 8 are there" in capsys.readouterr().err
    lock = RunLock(run.run_dir)
    lock.acquire()
    try:
        assert main(["rewind", str(run.run_dir), "4"]) == 2
    finally:
        lock.release()
    assert f"is in use by pid {os.getpid()} on host" in capsys.readouterr().err
    data = next((run.run_dir / "checkpoints" / "step_00000002").glob("data_*.bin"))
    data.write_bytes(data.read_bytes()[:-1])
    assert main(["rewind", str(run.run_dir), "2"]) == 2
    assert "checkpoint 2 is damaged, nothing was changed" in capsys.readouterr().err
    assert complete_steps(run.run_dir / "checkpoints") == [2, 4, 6, 8]
