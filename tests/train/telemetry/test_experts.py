"""What is written of the experts' load, and when the console is told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.layers.moe.balance import LoadBalance, RouterLoad
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.train.telemetry.metrics import JsonlSink, Metrics
from megatron_fp4.train.telemetry.monitors.experts import ExpertMonitor
from tests.train.in_process import RecordingConsole


class Watched:
    """A monitor of two layers of four experts, top 2, whose loads a test says."""

    def __init__(self, folder: Path, statistics_interval: int = 0) -> None:
        alone = Group.single()
        mesh: Any = SimpleNamespace(tp=alone, cp=alone, dp=alone, pp=alone)
        train = SimpleNamespace(
            log_interval_steps=2, statistics_interval_steps=statistics_interval, run_dir=str(folder)
        )
        moe = MoeConfig(num_experts=4, top_k=2, ffn_hidden=8, z_loss=1e-3)
        balance = LoadBalance([], mesh)
        self.loads = balance.loads
        run: Any = SimpleNamespace(
            config=SimpleNamespace(train=train, model=SimpleNamespace(moe=moe)),
            mesh=mesh,
            optimizer=SimpleNamespace(gradient_free=balance),
        )
        self.folder, self.console = folder, RecordingConsole()
        metrics = Metrics()
        metrics._sinks.append(JsonlSink(folder / "metrics.jsonl", 0))
        self.monitor = ExpertMonitor(run, metrics, self.console)

    def step(self, step: int, *counts: list[float], skipped: bool = False) -> None:
        means = torch.tensor([0.0, 0.0, 0.25, 1.2], dtype=torch.float64)
        for number, row in enumerate(counts):
            load = RouterLoad(torch.tensor(row, dtype=torch.float64), means)
            self.loads[f"blocks.{2 * number + 1}.moe.router"] = load
        self.monitor.end(step, skipped=skipped)

    def record(self, step: int) -> dict[str, Any]:
        lines = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        record: dict[str, Any] = next(line for line in lines if line["step"] == step)
        return record


def test_violation_is_of_the_step_and_dead_is_of_the_interval(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.step(1, [4, 4, 4, 4], [0, 8, 8, 0])
    watched.step(2, [0, 2, 4, 10], [0, 4, 4, 8])
    record = watched.record(2)
    assert record["experts/max_vio/blocks.1"] == 10 / 4 - 1
    assert (record["experts/dead/blocks.1"], record["experts/dead/blocks.3"]) == (0, 1)
    assert (record["experts/max_vio"], record["experts/median_vio"]) == (1.5, 1.25)
    assert record["experts/dead"] == 1
    assert record["experts/entropy/blocks.1"] == 1.2
    assert record["experts/z_loss/blocks.1"] == 0.25
    assert "experts/sequence_loss/blocks.1" not in record, "its coefficient is 0"
    assert watched.console.said == ["step 2: experts without a token in the last 2 steps: 1 of 4 in blocks.3"]
    assert not (tmp_path / "experts").exists()


def test_the_console_is_told_once_until_it_is_another(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for step in range(1, 9):
        dead = step > 2
        watched.step(step, [4, 4, 4, 4], [0 if dead else 4, 4, 4, 8 if dead else 4])
    assert watched.console.said == ["step 4: experts without a token in the last 2 steps: 1 of 4 in blocks.3"]


def test_a_skipped_step_counts_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path, statistics_interval=4)
    watched.step(1, [4, 4, 4, 4], [4, 4, 4, 4])
    watched.step(2, skipped=True)
    watched.step(3, [4, 4, 4, 4], [4, 4, 4, 4])
    watched.step(4, [0, 8, 4, 4], [4, 4, 4, 4])
    table = (tmp_path / "experts" / "step_00000004.txt").read_text()
    assert table == "tokens sent to each expert in 2 steps\nblocks.1 4 12 8 8\nblocks.3 8 8 8 8\n"
    with pytest.raises(StopIteration):
        watched.record(3)
