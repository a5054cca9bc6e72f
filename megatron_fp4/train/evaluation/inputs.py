"""Largest magnitudes of the inputs of linears over some batches, of which static scales are made.

They are measured once, before the first step of a run that has such scales, and are in every checkpoint of it: so
training, evaluation and an exported file multiply with the same numbers. What is larger later saturates, which
`saturation` of `train.statistics_interval_steps` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fp4.comm.collectives import all_reduce_max
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.data.batch import Batch
from megatron_fp4.data.loader import Loader
from megatron_fp4.layers.linear import assign_input_amax, linears_of
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.engine import Engine
from megatron_fp4.train.evaluation.heldout import evaluating
from megatron_fp4.train.inputs import look_ahead, make_inputs

INPUTS = "input_amax"
"""Where the small state of a checkpoint has them, by linear."""


@contextmanager
def watching_inputs(stages: Iterable[nn.Module], names: Collection[str]) -> Iterator[dict[str, Tensor]]:
    """Maxima, FP32 scalars, that every forward pass raises, of those linears of `names` that `stages` hold."""
    largest: dict[str, Tensor] = {}
    handles = []
    for stage in stages:
        for name, linear in linears_of(stage).items():
            if name in names:
                largest[name] = torch.zeros((), device=linear.weight.device)

                def look(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                    largest[name] = torch.maximum(largest[name], arguments[0].detach().abs().amax().float())

                handles.append(linear.register_forward_pre_hook(look))
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def settle_inputs(
    config: RunConfig,
    plan: PrecisionPlan,
    engine: Engine,
    loader: Loader,
    mesh: ParallelMesh,
    meta: Mapping[str, Any] | None,
    first_sample: int,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Give every linear with a static scale the largest magnitude of its input; what a checkpoint stores of all.

    meta: of the checkpoint that the run goes on from. What it has not is measured on the batches from `first_sample`
    on, with scales of their batch. beat: called after each microbatch. The same numbers on every rank, at any layout.
    Collective over the world. Raises ValueError where the run has not so many batches, and for inputs of zeros.
    """
    names = list(dict.fromkeys(name for _, table in plan.labelled_tables() for name in table.static_inputs))
    known = (meta or {}).get(INPUTS, {})
    values = {name: known[name] for name in names if name in known}
    missing = [name for name in names if name not in known]
    if missing:
        count, size = config.precision.calibration_batches, config.train.global_batch
        left = (config.run_samples - first_sample) // size
        if count > left:
            raise ValueError(
                f"precision.calibration_batches = {count}, but the run has {left} more of {size} samples; set it to"
                f" {max(1, left)}, or make the run longer"
            )
        table = plan.table(plan.phase_at(first_sample * config.data.seq_length))
        batches = (loader.batch(first_sample + number * size, size) for number in range(count))
        with evaluating(list(engine.stages), table), watching_inputs(engine.stages, missing) as largest:
            for batch in batches:
                _run(engine, batch, config.train.micro_batch, mesh, beat)
        values |= dict(zip(missing, _over_ranks(largest, missing, mesh, engine), strict=True))
    for stage in engine.stages:
        assign_input_amax(stage, values)
    return {INPUTS: values} if values else {}


def _run(engine: Engine, batch: Batch, micro_batch: int, mesh: ParallelMesh, beat: Callable[[], None]) -> None:
    device = next(engine.stages[0].parameters()).device
    ahead = look_ahead(batch, engine.depth)
    for inputs in make_inputs(batch, mesh.cp, device, ahead).split(micro_batch):
        engine.evaluate(inputs)
        beat()


def _over_ranks(largest: Mapping[str, Tensor], names: Sequence[str], mesh: ParallelMesh, engine: Engine) -> list[float]:
    zero = torch.zeros((), device=next(engine.stages[0].parameters()).device)
    values: list[float] = all_reduce_max(torch.stack([largest.get(name, zero) for name in names]), mesh.world).tolist()
    for name, value in zip(names, values, strict=True):
        if not 0.0 < value < float("inf"):
            raise ValueError(
                f"the largest magnitude of the input of {name} in precision.calibration_batches is {value}, of which no"
                " static scale can be made; take more batches, or another amax_scope"
            )
    return values
