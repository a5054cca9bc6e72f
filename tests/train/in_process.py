"""The trainer on this process, or on one rank of `run_distributed`, with a console that keeps what was said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_fp4.cli.compose import compose_config, to_run_config, to_yaml
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.launch import Launch
from megatron_fp4.train import trainer
from megatron_fp4.train.build import Start, build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.faults.guard import SpikeGuard
from megatron_fp4.train.faults.signals import StopRequest
from megatron_fp4.train.run import Position, Run
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.trainer import Outputs
from tests.helpers.distributed import world_group


class RecordingConsole(Console):
    """A console that keeps what was said."""

    def __init__(self) -> None:
        super().__init__(enabled=False, interval_steps=1)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class TrainerInProcess:
    """What `train.job` makes on a rank, and the attempts that `fit` made of it."""

    def __init__(self, run: Run, start: Start, outputs: Outputs) -> None:
        self.run = run
        self.start = start
        self.outputs = outputs
        self.attempts: list[trainer.Attempt] = []
        self.births: list[dict[str, Any]] = []
        """What each attempt began with, see `values_of`."""

    @property
    def position(self) -> Position:
        """Behind the newest step of the present attempt."""
        return self.attempts[-1].position if self.attempts else self.start.position

    def fit(self) -> int:
        attempts, births = self.attempts, self.births

        class RecordedAttempt(trainer.Attempt):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                attempts.append(self)
                births.append(values_of(self))

        with mock.patch.object(trainer, "Attempt", RecordedAttempt):
            return trainer.fit(self.run, self.start, self.outputs)


def values_of(attempt: trainer.Attempt) -> dict[str, Any]:
    """The numbers and positions that an attempt holds, itself or in the objects that were made for it, by name."""
    parts = dict(vars(attempt))
    for name in parts.keys() - {"run", "outputs"}:
        parts |= {f"{name}.{key}": part for key, part in getattr(parts[name], "__dict__", {}).items()}
    return {key: part for key, part in parts.items() if part is None or isinstance(part, int | float | str | Position)}


def make_trainer(
    overrides: Sequence[str], rank: int = 0, world_size: int = 1
) -> tuple[TrainerInProcess, RecordingConsole]:
    """As train/job.py makes it, with the metrics file on rank 0."""
    tree = compose_config(overrides)
    config = to_run_config(tree)
    process = Process(Launch(rank, world_size), world_group(rank, world_size), torch.device("cpu"))
    run, start = build(check_config(config, world_size), process)
    metrics, run_dir = Metrics(), Path(config.train.run_dir)
    if rank == 0:
        (run_dir / "config.yaml").write_text(to_yaml(tree))
        step = start.position.step
        metrics = Metrics.open(config.logging, run_dir, resume_step=step, wandb_id="id", settings={})
    console = RecordingConsole()
    guard = SpikeGuard(run, console, start.meta, start.remembered)
    return TrainerInProcess(run, start, Outputs(metrics, console, StopRequest(), guard, "id")), console


def falsify_loss(trainer: TrainerInProcess, factor: Callable[[], float]) -> None:
    """Let the engine report factor() times the loss; gradients stay."""
    right = trainer.run.engine.train

    def train(*args: object) -> Tensor:
        return right(*args) * factor()  # type: ignore[arg-type]

    trainer.run.engine.train = train  # type: ignore[method-assign]


def masters(trainer: TrainerInProcess) -> dict[str, Tensor]:
    return {shard.name: shard.tensors["master"].clone() for shard in trainer.run.optimizer.state_shards()}
