"""A checkpoint whose gradients are computed on one batch of its data, in any precision, and never applied.

Weights only are read, in any layout; nothing is written but to a folder that goes with it. The batch is the end of what
was consumed before the checkpoint, so it is there for a run that has ended too, and noise is that of its last step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.layers.linear import assign_precision
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.arrival.backend import settle_backend
from megatron_fp4.train.build import build
from megatron_fp4.train.checked import CheckedConfig, check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.inputs import Inputs, count_targets, look_ahead, make_inputs
from megatron_fp4.train.run import Run
from megatron_fp4.train.step import loss_scale
from megatron_fp4.train.telemetry.monitors.zeros import LinearHealth, linear_health

FEW_MICROBATCHES = 8
"""Of each data-parallel rank, where nobody says how many samples."""


@dataclass(frozen=True)
class Patient:
    """See the module. checked: of its configuration on these ranks. phase: of the precision plan, in which the
    checkpoint's last step computed. samples: [first, stop) of the batch."""

    run: Run
    checked: CheckedConfig
    phase: int
    step: int
    samples: tuple[int, int]
    microbatches: list[Inputs]
    num_targets: list[int]

    def gradient(self, table: PrecisionTable) -> list[LinearHealth]:
        """Forward and backward by `table`, and the zeros of it. Collective over the world.

        Raises ValueError where a gradient is not finite: NaN is no zero, so its counts would look sound.
        """
        run, probe = self.run, self.run.probes.channels
        assert probe is not None
        for stage in run.engine.stages:
            assign_precision(stage, table)
        run.clock.weights_version += 1
        run.optimizer.zero_grad()
        probe.begin()
        run.engine.train(self.microbatches, loss_scale(run, self.num_targets), lambda _: None)
        probe.recording = False
        run.optimizer.sum_grads()
        self._check_finite()
        return linear_health(run.config.model, run.engine.stages, probe, run.optimizer, run.mesh, run.device)

    def _check_finite(self) -> None:
        optimizer, counts = self.run.optimizer, dict[str, float]()
        for shard in optimizer.grad_shards():
            if shard.writes:
                count = (~torch.isfinite(shard.tensors["grad"])).sum().item()
                counts[shard.name] = counts.get(shard.name, 0.0) + count
        if bad := [name for name, count in optimizer.sum_by_name(counts).items() if count]:
            first, stop = self.samples
            raise ValueError(
                f"the gradient of {bad[0]} and {len(bad) - 1} more tensors is not finite at step {self.step}, samples"
                f" {first} to {stop - 1}, so its zeros say nothing; examine an earlier checkpoint (--step)"
            )


@contextmanager
def open_patient(
    config: RunConfig, process: Process, checkpoint: Path, meta: dict[str, object], num_samples: int = 0
) -> Iterator[Patient]:
    """The model of `checkpoint` by the settings `config`. Collective over the ranks of `process`.

    meta: the checkpoint's small state. num_samples: of the batch; 0: the run's, but at most FEW_MICROBATCHES of a rank.
    Raises ValueError and FileNotFoundError as a run that begins from the checkpoint would, and for samples that
    microbatches and data-parallel ranks do not divide.
    """
    with tempfile.TemporaryDirectory() as folder:
        checked = check_config(_config(config, folder, checkpoint, process.world.size), process.world.size)
        checked = settle_backend(checked, process.world.size, process.rendezvous, process.device)
        train, S = checked.config.train, checked.config.data.seq_length
        share = train.micro_batch * checked.dp
        consumed = meta.get("consumed_samples")
        end = consumed if isinstance(consumed, int) else 0
        count = num_samples or min(train.global_batch, FEW_MICROBATCHES * share)
        if count % share:
            raise ValueError(
                f"--samples {count} is not a multiple of train.micro_batch = {train.micro_batch} x dp = {checked.dp}"
            )
        first = max(0, end - count)
        run, _ = build(checked, process)
        texts, step = meta.get("precision"), meta.get("step")
        phase = run.plan.phase_before(end * S, texts if isinstance(texts, dict) else {})
        run.clock.step = max(0, step - 1) if isinstance(step, int) else 0
        run.clock.batch_samples = count
        batch = run.loader.batch(first, count)
        ahead = look_ahead(batch, run.config.model.mtp.depth)
        microbatches = make_inputs(batch, run.mesh.cp, run.device, ahead).split(train.micro_batch)
        yield Patient(
            run, checked, phase, run.clock.step + 1, (first, first + count), microbatches, count_targets(batch, ahead)
        )


def _config(config: RunConfig, folder: str, checkpoint: Path, world_size: int) -> RunConfig:
    """The run's settings for a run of its own in `folder`, which begins with the weights and is watched."""
    train = replace(
        config.train,
        run_dir=str(Path(folder) / "run"),
        init_from=str(checkpoint),
        decay_from="",
        statistics_interval_steps=1,
    )
    parallel = ParallelConfig() if world_size == 1 else replace(config.parallel, dp=0)
    return replace(config, train=train, parallel=parallel)
