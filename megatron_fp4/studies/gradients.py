"""How far a precision's gradient is from that of the study's first arm, on equal weights and batches.

No training is needed: recipes that a thousand steps cannot tell apart differ here at once. The number is the relative
squared error |g - r|^2 / |r|^2 of the whole gradient, and the cosine of the two. A seed draws batch and rounding noise,
and the weights where none are given.

What it does not say is how much of an error training forgives: an unbiased one averages out over steps, a biased one
does not. `bias` tells them apart: the error of the mean of several draws of noise on one batch, as a part of what one
draw has. Unbiased rounding leaves 1 / draws of it, nearest rounding all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.comm.bootstrap import Process, start_alone
from megatron_fp4.layers.linear import assign_precision
from megatron_fp4.studies.measures import GradientError
from megatron_fp4.train.build import build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.inputs import make_inputs
from megatron_fp4.train.run import Run
from megatron_fp4.train.sections import Resume

Gradient = dict[str, Tensor]
"""Logical tensor -> its gradient, FP32, summed over one global batch."""


@dataclass(frozen=True)
class Drawn:
    """What one draw of noise gave: loss in nats per target, and gradient."""

    loss: float
    gradient: Gradient


def gradient_errors(arms: Mapping[str, RunConfig], *, draws: int = 1) -> dict[str, GradientError]:
    """The errors of all arms but the first, which is the reference. arms: configurations of one process and one seed.

    Raises ValueError and FileNotFoundError as a run would.
    """
    process = start_alone(next(iter(arms.values())).train.device)
    gradients = ((arm, list(_gradients(config, process, draws))) for arm, config in arms.items())
    _, (reference, *_) = next(gradients)
    return {arm: _compare(of_arm, reference) for arm, of_arm in gradients}


def _gradients(config: RunConfig, process: Process, draws: int) -> Iterator[Drawn]:
    """Loss and gradient of the run's first batch, with the noise of steps 0, 1, ..., for so many draws."""
    with tempfile.TemporaryDirectory() as folder:
        train = replace(config.train, run_dir=str(Path(folder) / "run"), resume=Resume.auto)
        run, start = build(check_config(replace(config, train=train), process.world.size), process)
        for draw in range(draws):
            yield _gradient(run, start.position.samples, draw)


def _gradient(run: Run, first_sample: int, draw: int) -> Drawn:
    config, optimizer = run.config, run.optimizer
    batch = run.loader.batch(first_sample, config.train.batch_at(first_sample))
    run.clock.step = draw
    for stage in run.engine.stages:
        assign_precision(stage, run.plan.table(run.plan.phase_at(first_sample * config.data.seq_length)))
    optimizer.zero_grad()
    inputs = make_inputs(batch, run.mesh.cp, run.device).split(config.train.micro_batch)
    loss = run.engine.train(inputs, 1.0 / max(1, int(batch.loss_mask.sum())), lambda _: None)
    optimizer.sum_grads()
    gradient: dict[str, list[Tensor]] = {}
    for shard in optimizer.grad_shards():
        gradient.setdefault(shard.name, []).append(shard.tensors["grad"].detach().flatten().clone())
    return Drawn(float(loss), {name: torch.cat(parts) for name, parts in gradient.items()})


def _compare(drawn: list[Drawn], base: Drawn) -> GradientError:
    """Errors are means over the draws, the cosine is that of the first."""
    draws, reference = [one.gradient for one in drawn], base.gradient
    size = _product(reference, reference)
    error = sum(_distance(draw, reference) for draw in draws) / len(draws) / size
    cosine = _product(draws[0], reference) / (_product(draws[0], draws[0]) * size) ** 0.5
    bias = None
    if len(draws) > 1:
        mean = {name: torch.stack([draw[name].double() for draw in draws]).mean(0) for name in reference}
        bias = _distance(mean, reference) / size / error if error else 0.0
    loss = sum(one.loss for one in drawn) / len(drawn)
    return GradientError(error, cosine, bias, loss, base.loss, draws=len(draws))


def _product(one: Gradient, other: Gradient) -> float:
    return sum(torch.dot(one[name].double(), other[name].double()).item() for name in other)


def _distance(one: Gradient, other: Gradient) -> float:
    return sum((one[name].double() - other[name].double()).square().sum().item() for name in other)
