"""One model, several layouts: does each compute the numbers of a single process?

Every rank reports rectangles of logical tensors (gradients, master weights, live parameters), so a layout is compared
with one process without knowing how it divides anything. Tokens are synthetic and the same for all layouts.

`run_cases` makes the records on the ranks. Not here: comparing them (distance.py), what a difference means
(verdict.py), and a small model of a large one (shrink.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.comm.rect import Shard
from megatron_fp4.data.batch import Batch
from megatron_fp4.data.ramp import steps_from
from megatron_fp4.precision.backends.choose import eager_emulation
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.inputs import Inputs, count_targets, look_ahead, make_inputs
from megatron_fp4.train.trainable import Trainable, build_trainable


@dataclass(frozen=True)
class Case:
    """What all layouts compute.

    config: its `parallel` is replaced by the layout's. targets: part of the columns whose tokens are targets, e.g.
    (0.0, 0.25) for the first quarter; some of them are masked at random. prepare: what is done to
    the stages of a rank before the first step (routing.py), of these and the run's seed.
    """

    name: str
    config: RunConfig
    table: PrecisionTable
    num_steps: int = 5
    targets: tuple[float, float] = (0.0, 1.0)
    prepare: Callable[[Iterable[nn.Module], int], None] | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """What one rank saw, as copies.

    losses: its part of the sum, per step. norms: per step. grads: "grad" of what it updates, after the sums of
    step 1, FP32. masters: "master" of the same before step 1, after step 1 and after the last, FP32. live:
    "parameter" of all local rows after the last step, in the compute dtype.
    """

    losses: list[float]
    norms: list[float]
    grads: list[Shard]
    masters: dict[int, list[Shard]]
    live: list[Shard]


def run_cases(process: Process, cases: Sequence[Case], parallel: ParallelConfig) -> list[Record]:
    """Run every case on this rank of the layout. Collective over the world."""
    mesh = build_mesh(parallel, process.world, experts=any("E" in case.config.model.letters for case in cases))
    return [run_case(process, case, parallel, mesh) for case in cases]


def run_case(process: Process, case: Case, parallel: ParallelConfig, mesh: ParallelMesh) -> Record:
    """Run one case on this rank of the layout, whose mesh is `mesh`. Collective over the world."""
    config = replace(case.config, parallel=parallel)
    backend = eager_emulation(centred=case.table.centred)
    trainable = build_trainable(config, case.table, backend, mesh, process.device)
    trainable.draw_given(config, case.table, mesh, process.device, backend)
    optimizer, engine = trainable.optimizer, trainable.engine
    if case.prepare is not None:
        case.prepare(engine.stages, config.train.seed)
    losses: list[float] = []
    norms: list[float] = []
    grads: list[Shard] = []
    masters = {0: copies(optimizer.state_shards(), "master")}
    for step in range(case.num_steps):
        trainable.clock.step = step
        inputs, num_targets = synthetic_inputs(case, mesh, step, process.device)
        trainable.clock.batch_samples = len(inputs.tokens) * mesh.dp.size
        optimizer.zero_grad()
        microbatches = inputs.split(config.train.micro_batch)
        loss = engine.train(microbatches, 1.0 / num_targets, optimizer.begin_last_microbatch)
        norm = optimizer.finish_grads()
        losses.append(loss.item() if engine.reports_loss and mesh.tp.rank == 0 else 0.0)
        norms.append(norm)
        if step == 0:
            grads = copies(optimizer.grad_shards(), "grad")
        optimizer.step(norm, lr=config.optim.lr, max_norm=config.optim.clip_norm)
        if step in (0, case.num_steps - 1):
            masters[step + 1] = copies(optimizer.state_shards(), "master")
    optimizer.wait_parameters()
    return Record(losses, norms, grads, masters, _live(trainable))


def synthetic_inputs(case: Case, mesh: ParallelMesh, step: int, device: torch.device) -> tuple[Inputs, int | Tensor]:
    """This rank's share of step `step`'s random batch, and the number of targets in the whole of it.

    With multi-token prediction they are one of each loss, FP64 `[1 + depth]`.
    """
    train, S = case.config.train, case.config.data.seq_length
    random = torch.Generator().manual_seed(1000 * train.seed + step)
    _, num_samples = next(itertools.islice(steps_from(0, train.batch_ramp, train.global_batch), step, None))
    shape = (num_samples, S)
    ids = torch.randint(case.config.model.vocab_size, (shape[0], S + 1), generator=random)
    starts = torch.rand(shape, generator=random) < 4.0 / S  # about four more documents in a sample
    documents = starts.cumsum(1)
    columns = torch.arange(S).expand(shape)
    first = torch.where(starts, columns, 0).cummax(1).values
    positions = columns - first if case.config.data.reset_documents else columns
    low, high = (int(part * S) for part in case.targets)
    mask = (torch.rand(shape, generator=random) < 0.9) & (columns >= low) & (columns < high)
    address = torch.arange(shape[0] * S).view(shape)
    whole = Batch(ids[:, :-1], ids[:, 1:], mask, positions, documents, address, torch.arange(shape[0]))
    rows = shape[0] // mesh.dp.size
    local = Batch(*(tensor[mesh.dp.rank * rows : (mesh.dp.rank + 1) * rows] for tensor in whole))
    depth = case.config.model.mtp.depth
    inputs = make_inputs(local, mesh.cp, device, look_ahead(local, depth))
    counts = count_targets(whole, look_ahead(whole, depth))
    return inputs, torch.tensor(counts, dtype=torch.float64, device=device).clamp(min=1.0) if depth else counts[0]


def copies(shards: Iterable[Shard], *kinds: str) -> list[Shard]:
    """The tensors of these kinds (none named: of all), which training goes on to change, as they are now."""
    return [
        Shard(shard.where, {kind: shard.read(kind).clone() for kind in kinds or shard.tensors}, shard.writes)
        for shard in shards
    ]


def _live(trainable: Trainable) -> list[Shard]:
    return [
        Shard(where, {"parameter": parameter.detach()[rows].clone()})
        for stage in trainable.engine.stages
        for parameter in logical_parameters(stage)
        for rows, where in parameter.placement.pieces()
    ]
