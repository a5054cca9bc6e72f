"""Numbers for the operator: norms, throughput, stragglers, time-outs that fit together, memory that stays flat."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_fp4.checkpoint import CheckpointConfig
from megatron_fp4.checkpoint.directory import read_state
from megatron_fp4.checkpoint.offline import resolve
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.count import count_flops
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train import trainer as trainer_module
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.evaluation import sets as evaluation_sets
from megatron_fp4.train.evaluation.heldout import HeldOutLoss
from megatron_fp4.train.phases import STEP_PHASES, Phases
from megatron_fp4.train.sections import TrainConfig
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import read_metrics
from megatron_fp4.train.telemetry.peaks import GPUS, find_gpu
from megatron_fp4.train.telemetry.throughput import Throughput
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_run import ROOT, tiny_run
from tests.train.in_process import falsify_loss, make_trainer, masters


def test_metrics_of_a_step(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "train.stop_after_steps=4", "train.log_interval_steps=2", "precision=bf16")
    trainer, _ = make_trainer(run.overrides)
    trainer.fit()
    records = {record["step"]: record for record in read_metrics(run.run_dir) if "loss" in record}
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in masters(trainer).values()))
    assert records[4]["param_norm"] == pytest.approx(norm, rel=1e-6)
    assert "param_norm" not in records[3], "it reads all weights: only in the steps that are logged"
    flops = count_flops(trainer.run.config.model, 32).training
    assert records[4]["tflops"] * 1e12 == pytest.approx(flops * records[4]["tokens_per_second"], rel=1e-9)
    assert records[4]["step_seconds"] >= records[4]["data_wait_seconds"] > 0
    saves = [record for record in read_metrics(run.run_dir) if "save/seconds" in record]
    assert [(record["step"], record["save/failed"]) for record in saves] == [(4, 0.0)]


def test_what_a_checkpoint_says_of_its_origin(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "train.stop_after_steps=1", "precision=bf16")
    make_trainer(run.overrides)[0].fit()
    meta = read_state(resolve(run.run_dir / "checkpoints"))["meta"]
    assert meta["versions"]["torch"] == torch.__version__
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (meta["git"] or "").removesuffix("-dirty") == commit


def test_the_best_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loss on the first evaluation set, at the steps at which there was one."""
    sets = ", ".join(f"{{name: {name}, paths: ['{tmp_path / 'shards' / 'toy'}']}}" for name in ("held", "other"))
    run = tiny_run(
        tmp_path, "train.stop_after_steps=10", "precision=bf16", f"data.evaluation=[{sets}]", "checkpoint.keep_last=1",
        "train.eval_interval_steps=2", "train.save_interval_steps=1", "checkpoint.keep_best=1",
        "checkpoint.asynchronous=false",
    )  # fmt: skip
    losses = iter([3.0, 0.0, 1.0, 9.0, 2.0, 0.0, 2.5, 0.0, 1.5, 0.0])  # of both sets in turn, at steps 2, 4, ...
    monkeypatch.setattr(evaluation_sets, "evaluate", lambda *_: HeldOutLoss(next(losses)))
    trainer, _ = make_trainer(run.overrides)
    trainer.fit()
    assert trainer.run.store.complete_steps() == [4, 10]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1000.0}
    shown = {}
    for kind in (Terminal, io.StringIO):
        stream = shown[kind] = kind()
        monkeypatch.setattr(sys, "stdout", stream)
        console = Console(enabled=True, interval_steps=10)
        console.say("[not markup]")
        console.start(0, 20)
        for step in range(1, 6):
            console.step(step, values)
        console.start(2, 20)  # after a rollback
        console.step(3, values)
        console.close()
    terminal, log = (shown[kind].getvalue() for kind in (Terminal, io.StringIO))
    assert log.count("\n") == 3
    assert "\x1b" not in log, "control characters would make a log file unreadable"
    assert all(line in terminal for line in log.splitlines())
    assert re.search("step\\s.* 3/20 .*loss 2.5000", terminal), "no progress line"
    assert terminal.rindex("\x1b[?25h") > terminal.rindex("3/20"), "the cursor was not given back"


def test_utilization(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that needs the time of its peak has an MFU of 1, against BF16 and against the mix of rates."""
    config = to_run_config(compose_config(["experiment=paper_12b_10t", "model.vocab_size=131072"]))
    table = PrecisionPlan(config.precision, model_linears(config.model), total_tokens=10**13).table()
    throughput, phases = Throughput(config, 512, torch.device("cpu")), Phases(torch.device("cpu"))
    tokens = config.tokens_per_step
    assert "mfu" not in _metrics(throughput, phases, table, 1.0, tokens)
    throughput.gpu = GPUS["GB200"]
    flops = count_flops(config.model, config.data.seq_length).training * tokens / 512
    assert _metrics(throughput, phases, table, flops / 2.5e15, tokens)["mfu"] == pytest.approx(1.0)
    half = _metrics(throughput, phases, table, flops / 2.5e15, tokens // 2)
    assert half["mfu"] == pytest.approx(0.5), "a step of a batch-size ramp has its own number of tokens"
    rates = _metrics(throughput, phases, table, 10.0, tokens)
    assert rates["mfu_mixed"] < rates["mfu"], "with FP4 GEMMs the same time is a smaller part of what is possible"
    throughput.gpu = GPUS["H100"]
    rates = _metrics(throughput, phases, table, 10.0, tokens)
    assert rates["mfu_mixed"] == pytest.approx(rates["mfu"]), "no FP4 units: both peaks are BF16's"
    assert "data sheet" in throughput.describe()


def _metrics(throughput: Throughput, phases: Phases, table: object, seconds: float, tokens: int) -> dict[str, float]:
    phases._seconds = {"update": seconds}
    return throughput.metrics(phases, table, tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GB200", "GB200"), ("NVIDIA B200", "B200"), ("NVIDIA A100-SXM4", None)],
)
def test_gpu_by_the_drivers_name(name: str, expected: str | None) -> None:
    gpu = find_gpu(name)
    assert (gpu.name if gpu else None) == expected


def slow_rank(rank: int, world_size: int, overrides: list[str]) -> list[str]:
    trainer, console = make_trainer(overrides, rank, world_size)
    if rank == 1:
        falsify_loss(trainer, lambda: time.sleep(0.3) or 1.0)  # type: ignore[func-returns-value]
    trainer.fit()
    return console.said


def test_the_slowest_rank_of_a_phase_is_named(tmp_path: Path) -> None:
    run = tiny_run(
        tmp_path, "parallel.dp=2", "train.stop_after_steps=3", "train.straggler_interval_steps=2", "precision=bf16"
    )
    printed = run_distributed(slow_rank, 2, list(run.overrides))[0]
    (line,) = [text for text in printed if "slowest ranks" in text]
    assert line.startswith("step 2: ")
    assert "forward_backward rank 1 0." in line
    assert "the others waited for rank 1, " in line, "the rank that waits least is the one that is late"
    (record,) = [record for record in read_metrics(run.run_dir) if "straggler/update/rank" in record]
    assert record["straggler/forward_backward/rank"] == record["straggler/waited_for/rank"] == 1.0
    assert record["straggler/forward_backward/seconds"] > 0.3
    assert {f"straggler/{phase}/seconds" for phase in STEP_PHASES} <= record.keys()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (RunConfig(checkpoint=CheckpointConfig(timeout_seconds=600.0)), "checkpoint.timeout_seconds = 600"),
        (RunConfig(train=TrainConfig(hang_timeout_seconds=900.0)), "train.hang_timeout_seconds = 900"),
        (RunConfig(parallel=ParallelConfig(timeout_seconds=100.0)), "parallel.timeout_seconds = 100"),
    ],
)
def test_timeouts_that_would_hide_the_culprit_are_refused(config: RunConfig, names: str) -> None:
    config.check_timeouts(world_size=1)
    with pytest.raises(ValueError, match=names):
        config.check_timeouts(world_size=2)


def test_host_memory_is_flat_over_500_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(
        tmp_path, "precision=bf16", "model.num_layers=1", "train.micro_batch=4", f"train.total_tokens={500 * 4 * 32}",
        "train.save_interval_steps=50", "train.log_interval_steps=100",
    )  # fmt: skip
    trainer, _ = make_trainer(run.overrides)
    seen: dict[int, int] = {}
    right = trainer_module.Attempt._after_step

    def after_step(attempt: trainer_module.Attempt) -> None:
        right(attempt)
        if attempt.position.step in (150, 500):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[attempt.position.step] = pages * os.sysconf("SC_PAGE_SIZE")

    monkeypatch.setattr(trainer_module.Attempt, "_after_step", after_step)
    trainer.fit()
    grown = (seen[500] - seen[150]) / 2**20
    assert grown < 24, f"{grown:.1f} MiB more after 350 steps and 7 saves: something keeps what it was given"
