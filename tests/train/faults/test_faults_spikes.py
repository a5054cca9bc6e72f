"""The ladder of a loss spike: skip the batch, roll back and skip the samples, abort; and what is left to look at it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp4.cli.trained.replay import main as replay
from megatron_fp4.comm.mesh import Group
from megatron_fp4.data.ledger import read_step
from megatron_fp4.train.faults.rollback import RECORD, recall
from megatron_fp4.train.faults.spikes import Action, SpikeLadder
from megatron_fp4.train.run import TrainingDiverged
from megatron_fp4.train.sections import SpikeConfig
from megatron_fp4.train.telemetry.metrics import read_metrics
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import ROOT, tiny_run
from tests.train.in_process import TrainerInProcess, falsify_loss, make_trainer, masters

LADDER = (
    "train.spikes.ratio=1.5",
    "train.spikes.window_steps=8",
    "train.spikes.min_steps=4",
    "train.save_interval_steps=4",
    "checkpoint.keep_last=9",
    "checkpoint.asynchronous=false",
    "train.stop_after_steps=16",
    "precision=bf16",
)


def plant(trainer: TrainerInProcess, bad_ids: range, factor: float = 10.0) -> None:
    """Batches that hold a bad sample have a loss `factor` times too high."""
    plan, size = trainer.run.loader, trainer.run.config.train.global_batch

    def of_step() -> float:
        ids = plan.plan.ids(trainer.position.samples, size).tolist()
        return factor if set(ids) & set(bad_ids) else 1.0

    falsify_loss(trainer, of_step)


def actions(run_dir: Path) -> list[tuple[int, str]]:
    lines = (run_dir / "spikes.jsonl").read_text().splitlines()
    return [(line["step"], line["action"]) for line in map(json.loads, lines) if "loss" in line]


def test_the_ladder(tmp_path: Path) -> None:
    """Samples 40 to 47 (steps 11 and 12) are bad: the first is skipped, the second leads back to checkpoint 8."""
    run = tiny_run(tmp_path, *LADDER)
    trainer, console = make_trainer(run.overrides)
    plant(trainer, range(40, 48))
    assert trainer.fit() == 0
    assert actions(run.run_dir) == [(11, "skip"), (12, "roll_back")]
    assert any(
        "rolled back from step 12 to checkpoint 8; samples 32 to 47 are skipped" in text for text in console.said
    )
    steps = [record["step"] for record in read_metrics(run.run_dir) if "loss" in record]
    assert steps == list(range(1, 17)), "after the rewind each step must be present once"
    assert read_step(run.run_dir, 9).first_sample == 32, "the ledger must void the steps before the rollback"

    other = tiny_run(tmp_path, *LADDER, "train.spikes.ratio=0", "data.skip=[[32,48]]").with_overrides(
        run_dir=tmp_path / "other"
    )
    without_them, _ = make_trainer(other.overrides)
    without_them.fit()
    expected = masters(without_them)
    for name, tensor in masters(trainer).items():
        assert torch.equal(tensor, expected[name]), f"{name}: a run that never saw these samples has other weights"

    check_bundle(run.run_dir / "spikes" / "step_00000012")
    resumed, _ = make_trainer((*run.overrides, "train.stop_after_steps=17"))
    assert resumed.run.loader.plan.skip == [(32, 48)], "a resume would read the bad samples"
    assert resumed.outputs.guard.state_dict() == trainer.outputs.guard.state_dict(), (
        "a resumed run would judge otherwise"
    )


def check_bundle(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    assert [sample["sample_id"] for sample in report["samples"]] == [44, 45, 46, 47]
    assert report["samples"][0]["pieces"][0]["source"] == "toy"
    norms = json.loads((bundle / "norms.json").read_text())
    assert norms["blocks.1.attention.qkv.q.weight"]["gradient"] > 0
    assert norms["blocks.1.attention.qkv.q.weight"]["parameter"] > 0
    assert not (bundle / "quantization.txt").exists(), "nothing is quantized in this run"


def test_the_bundle_of_a_quantized_run_and_its_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples 44 to 47 (step 12) lead straight back to checkpoint 8. Both lines of replay.sh are run."""
    run = tiny_run(tmp_path, *LADDER[:-1], "train.spikes.max_skips=0", "train.stop_after_steps=13")
    trainer, _ = make_trainer(run.overrides)
    plant(trainer, range(44, 48))
    trainer.fit()
    bundle = run.run_dir / "spikes" / "step_00000012"
    assert replay([str(run.run_dir)]) == 2
    assert capsys.readouterr().err.endswith(f"(it holds no report.json); give one of its spikes: {bundle}\n")
    table = (bundle / "quantization.txt").read_text().splitlines()
    rows = {line.split()[0]: float(line.split()[1]) for line in table[1:]}
    operands = ("fprop.x", "fprop.w", "dgrad.dy", "wgrad.dy", "wgrad.x")  # dgrad.w: the codes of fprop.w
    assert {f"blocks.0.mlp.up/{operand}" for operand in operands} <= rows.keys()
    assert all(5 < snr_db < 40 for snr_db in rows.values()), f"not the errors of a 4-bit format: {rows}"

    monitored = tiny_run(tmp_path, *LADDER[:-1], "train.statistics_interval_steps=12").with_overrides(
        "train.spikes.max_skips=0", "train.stop_after_steps=13", run_dir=tmp_path / "monitored"
    )
    other, _ = make_trainer(monitored.overrides)
    plant(other, range(44, 48))
    other.fit()
    seen = monitored.run_dir / "spikes" / "step_00000012" / "quantization.txt"
    assert seen.read_text().splitlines() == table, "the step that is made again to measure it is another step"

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", bundle / "replay.sh"], env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    quantized, bf16 = (float(text.split()[0]) for text in done.stdout.split("step 12: loss ")[1:])
    in_the_run = json.loads((bundle / "report.json").read_text())["loss"] / 10  # see `plant`
    assert quantized == pytest.approx(in_the_run, abs=1e-6), "the replay saw another batch, weights or rounding"
    assert bf16 != quantized, "--precision bf16 had no effect"

    launcher = [ROOT / "launch/torchrun.sh", "--nproc-per-node", "2", "replay", str(bundle)]
    config = (bundle / "config.yaml").read_text()
    (bundle / "config.yaml").write_text(config.replace("  pp: 1\n", "  pp: 2\n"))
    environment = {**os.environ, "MEGATRON_FP4_PYTHON": sys.executable}
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (two_stages,) = (float(text.split()[0]) for text in done.stdout.split("step 12: loss ")[1:])
    assert two_stages == quantized, "at pp 2 the step is another one than in one process"
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name], "its folder stayed"
    assert bf16 == pytest.approx(quantized, rel=0.05)


def damage_in_step_11(trainer: TrainerInProcess, *steps: int) -> None:
    """Cut a file of these checkpoints short before the spikes."""
    right = trainer.run.phases.begin

    def begin(step: int, *, exact: bool = False) -> None:
        right(step, exact=exact)
        while step == 11 and damaged:
            path = trainer.run.store.root / f"step_{damaged.pop():08}" / "data_0000.bin"
            os.truncate(path, path.stat().st_size - 9)

    damaged = list(steps)
    trainer.run.phases.begin = begin  # type: ignore[method-assign]


@pytest.mark.parametrize("verify", [True, False])
def test_a_rollback_passes_over_a_damaged_checkpoint(tmp_path: Path, verify: bool) -> None:
    """As a resume does; also where the damage is seen only when the tensors are read."""
    run = tiny_run(tmp_path, *LADDER, f"checkpoint.verify={verify}", "model.num_layers=1")
    trainer, console = make_trainer(run.overrides)
    plant(trainer, range(40, 48))
    damage_in_step_11(trainer, 8)
    assert trainer.fit() == 0
    assert any("from step 12 to checkpoint 4; samples 16 to 47 are skipped" in text for text in console.said)
    assert trainer.run.store.choose(8).step == 8, "written anew, and still taken for damaged"
    assert trainer.run.store.choose(before=12).step == 8


def test_a_rollback_without_an_intact_checkpoint_ends_the_run(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tiny_run(tmp_path, *LADDER, "model.num_layers=1").overrides)
    plant(trainer, range(40, 48))
    damage_in_step_11(trainer, 4, 8)
    with pytest.raises(TrainingDiverged, match=r"loss spikes since step 11, and no intact checkpoint under"):
        trainer.fit()


def killed_after_the_rollback(overrides: list[str], bad_ids: range) -> None:
    """SIGKILL in step 10, when it is made for the second time."""
    trainer, _ = make_trainer(overrides)
    plant(trainer, bad_ids)
    right, passes = trainer.run.phases.begin, []

    def begin(step: int, *, exact: bool = False) -> None:
        right(step, exact=exact)
        passes.append(step)
        if passes.count(10) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.run.phases.begin = begin  # type: ignore[method-assign]
    trainer.fit()


def test_a_rollback_outlives_a_kill_before_the_next_save(tmp_path: Path) -> None:
    """The spike was a fault that does not come again: only what was written down can keep the samples out."""
    whole, _ = make_trainer(tiny_run(tmp_path, *LADDER).overrides)
    plant(whole, range(40, 48))
    whole.fit()

    run = tiny_run(tmp_path, *LADDER).with_overrides(run_dir=tmp_path / "killed")
    process = multiprocessing.get_context("spawn").Process(
        target=killed_after_the_rollback, args=(run.overrides, range(40, 48))
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    resumed, _ = make_trainer(run.overrides)
    assert resumed.position.step == 8, "the test is wrong: a checkpoint was written after the rollback"
    assert resumed.run.loader.plan.skip == [(32, 48)], "the bad samples would be read"
    assert "rollback 1 to checkpoint 8 still holds: samples 32 to 47 are skipped" in str(resumed.start.remembered)
    resumed.fit()
    expected = masters(whole)
    for name, tensor in masters(resumed).items():
        assert torch.equal(tensor, expected[name]), f"{name}: the killed run went another way"
    assert resumed.outputs.guard.state_dict() == whole.outputs.guard.state_dict(), (
        "the resumed run forgot that it was rolled back"
    )

    later, _ = make_trainer((*run.overrides, "train.stop_after_steps=17"))
    assert later.start.remembered is None, "the checkpoint of step 16 knows of the rollback"
    assert later.run.loader.plan.skip == [(32, 48)]
    shutil.rmtree(run.run_dir / "checkpoints")
    anew, _ = make_trainer(run.overrides)
    assert anew.run.loader.plan.skip == [], "a run that begins anew took over a rollback of another one"
    assert not (run.run_dir / "rollback.json").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\0",
        b"null",
        b'{"step": "8", "skip": [], "rollbacks": 1}',
        b'{"step": 8, "skip": ["ab"], "rollbacks": 1}',
        b'{"step": 8, "skip": [1], "rollbacks": 1}',
    ],
)
def test_a_damaged_record_of_a_rollback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{RECORD} is damaged \((?!.*is damaged).*; remove it to go on without the rollback"
    ):
        recall(tmp_path, {"step": 4}, Group.single("world"))


def test_a_skipped_batch_changes_nothing(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, *LADDER, "train.stop_after_steps=11")
    trainer, _ = make_trainer(run.overrides)
    plant(trainer, range(40, 44))
    trainer.fit()
    before = tiny_run(tmp_path, *LADDER, "train.stop_after_steps=10").with_overrides(run_dir=tmp_path / "before")
    ten, _ = make_trainer(before.overrides)
    ten.fit()
    expected = masters(ten)
    for name, tensor in masters(trainer).items():
        assert torch.equal(tensor, expected[name]), f"{name} changed in a skipped step"
    last = [record for record in read_metrics(run.run_dir) if "loss" in record][-1]
    assert (last["step"], last["skipped"], last["skipped_steps"]) == (11, 1.0, 1.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [(["train.spikes.max_rollbacks=0"], "after 0 rollback"), (["train.save_interval_steps=0"], "no checkpoint before")],
)
def test_the_end_of_the_ladder(tmp_path: Path, more: list[str], message: str) -> None:
    trainer, _ = make_trainer(tiny_run(tmp_path, *LADDER, *more).overrides)
    plant(trainer, range(20, 32))
    with pytest.raises(TrainingDiverged, match=message):
        trainer.fit()


def spike_on_one_rank(rank: int, world_size: int, overrides: list[str]) -> tuple[int, Any, dict[str, torch.Tensor]]:
    trainer, _ = make_trainer(overrides, rank, world_size)
    if rank == 1:
        plant(trainer, range(40, 48), 100.0)
    trainer.fit()
    return trainer.position.step, trainer.run.loader.plan.skip, masters(trainer)


def test_all_ranks_roll_back_together(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, *LADDER, "parallel.dp=2")
    ends = run_distributed(spike_on_one_rank, 2, list(run.overrides))
    assert [(step, skip) for step, skip, _ in ends] == [(16, [(32, 48)])] * 2
    assert actions(run.run_dir) == [(11, "skip"), (12, "roll_back")]


@pytest.mark.parametrize(
    ("settings", "losses", "expected"),
    [
        ({"ratio": 2.0}, [1, 1, 1, 1, 1.9], Action.go_on),
        ({"ratio": 2.0}, [1, 1, 1, 2.1], Action.go_on),
        ({"ratio": 2.0}, [1, 1, 1, 1, 2.1], Action.skip),
        ({"z_score": 4.0}, [1.0, 1.2, 1.0, 1.2, 1.4], Action.go_on),
        ({"z_score": 4.0}, [1.0, 1.2, 1.0, 1.2, 1.6], Action.skip),
        ({"ratio": 2.0}, [1, 1, 1, 1, float("nan")], Action.go_on),
        ({"ratio": 2.0}, [1, 1, 1, 1, 9, 1, 9], Action.skip),
        ({"ratio": 2.0}, [1, 1, 1, 1, 9, 9], Action.roll_back),
        ({}, [1, 1, 1, 1, 9], Action.go_on),
    ],
)
def test_judgement(settings: dict[str, float], losses: list[float], expected: Action) -> None:
    ladder = SpikeLadder(SpikeConfig(**settings, window_steps=8, min_steps=4))  # type: ignore[arg-type]
    judged = [ladder.judge(step, loss).action for step, loss in enumerate(losses, 1)]
    assert judged[-1] is expected, judged


def test_rollbacks_are_forgiven_after_a_good_window() -> None:
    ladder = SpikeLadder(SpikeConfig(ratio=2.0, window_steps=4, min_steps=2, max_skips=0, max_rollbacks=1))
    for step in range(1, 5):
        ladder.judge(step, 1.0)
    assert ladder.judge(5, 9.0).action is Action.roll_back
    ladder.rolled_back({"losses": [1.0, 1.0]}, 1)
    assert ladder.judge(5, 9.0).action is Action.abort
    for step in range(5, 9):
        ladder.judge(step, 1.0)
    assert ladder.judge(9, 9.0).action is Action.roll_back


def test_impossible_ladders_are_refused() -> None:
    for settings in ({"ratio": 0.9}, {"z_score": -1.0}, {"min_steps": 1}, {"min_steps": 9, "window_steps": 8}):
        with pytest.raises(ValueError, match=r"train\.spikes"):
            SpikeConfig(**settings)  # type: ignore[arg-type]
