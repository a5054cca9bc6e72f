"""The trainer on this process, or on one rank of `run_distributed`, with a console that keeps what was said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.cli.compose import compose_config, to_run_config, to_yaml
from megatron_fp4.comm.bootstrap import Launch, Process
from megatron_fp4.train.build import build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.faults.signals import StopRequest
from megatron_fp4.train.telemetry.console import Console
from megatron_fp4.train.telemetry.metrics import Metrics
from megatron_fp4.train.trainer import Trainer
from tests.helpers.distributed import world_group


class Recorder(Console):
    def __init__(self) -> None:
        super().__init__(enabled=False, interval_steps=1)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def make_trainer(overrides: Sequence[str], rank: int = 0, world_size: int = 1) -> tuple[Trainer, Recorder]:
    """As pretrain.py makes it, with the metrics file on rank 0."""
    tree = compose_config(overrides)
    config = to_run_config(tree)
    process = Process(Launch(rank, world_size), world_group(rank, world_size), torch.device("cpu"))
    run = build(check_config(config, world_size), process)
    metrics, run_dir = Metrics(), Path(config.train.run_dir)
    if rank == 0:
        (run_dir / "config.yaml").write_text(to_yaml(tree))
        step = run.resumed["step"] if run.resumed else 0
        metrics = Metrics.open(config.logging, run_dir, resume_step=step, wandb_id="id", settings={})
    console = Recorder()
    return Trainer(run, metrics, console, StopRequest(), "id"), console


def falsify_loss(trainer: Trainer, factor: Callable[[], float]) -> None:
    """Let the engine report factor() times the loss; gradients stay."""
    right = trainer.run.engine.train

    def train(*args: object) -> Tensor:
        return right(*args) * factor()  # type: ignore[arg-type]

    trainer.run.engine.train = train  # type: ignore[method-assign]


def masters(trainer: Trainer) -> dict[str, Tensor]:
    return {shard.name: shard.tensors["master"].clone() for shard in trainer.run.optimizer.state_shards()}
