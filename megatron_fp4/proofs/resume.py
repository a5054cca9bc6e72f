"""Is a killed and resumed run the run that was never stopped? For a small model, on synthetic tokens.

The same function runs from the newest checkpoint (or from the start) to a step, saves on the way, and reports losses
and all optimizer state as rectangles of logical tensors. Called without and with an end by SIGKILL, and at other
layouts, its reports must be equal.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore, latest_step
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import kill_local, run_local
from megatron_fp4.comm.mesh import build_mesh
from megatron_fp4.comm.rect import Shard
from megatron_fp4.precision.backends.choose import eager_emulation
from megatron_fp4.proofs.distance import assemble
from megatron_fp4.proofs.layouts import Layout
from megatron_fp4.proofs.parity import Case, copies, synthetic_inputs
from megatron_fp4.train.evaluation.heldout import evaluating
from megatron_fp4.train.trainable import build_trainable

OTHER_LOSS, OTHER_STATE = 1e-6, 1e-4
"""Largest relative difference at another layout, in FP32 compute without quantization; measured: 1e-7 each. With
quantized GEMMs one code that falls the other way changes every later step, so those are compared at the same layout.
"""


@dataclass(frozen=True)
class Stretch:
    """What to run: to `last_step` (from the newest checkpoint under `root`, if there is one), saving after `save_step`.

    mark: a file that the first rank makes when it begins `mark_step`, for whoever wants to kill it then ("" = none).
    """

    root: str
    save_step: int
    last_step: int
    mark: str = ""
    mark_step: int = 0


@dataclass(frozen=True, eq=False)
class StretchReport:
    """What one rank saw.

    began: steps that were done when it started. losses: its parts, per step made. state: of the optimizer, after the
    last step.
    """

    began: int
    losses: dict[int, float]
    state: list[Shard]


def run_stretch(process: Process, case: Case, parallel: ParallelConfig, stretch: Stretch) -> StretchReport:
    """Run this rank's part of the stretch. Collective over the world.

    Where the run evaluates, this one does so after every step, in the precision of training, whose quantized weights
    are kept: those of an evaluation must not serve the next step.
    """
    mesh = build_mesh(parallel, process.world, experts="E" in case.config.model.letters)
    config = replace(case.config, parallel=parallel)
    backend = eager_emulation(centred=case.table.centred)
    trainable = build_trainable(config, case.table, backend, mesh, process.device)
    trainable.draw_given(config, case.table, mesh, process.device, backend)
    optimizer, engine = trainable.optimizer, trainable.engine
    store = CheckpointStore(stretch.root, process.world, CheckpointConfig())
    began = 0
    if store.latest() is not None:
        chosen = store.choose()
        store.load(chosen, optimizer.state_to_fill())
        optimizer.after_load(chosen.meta["optimizer_steps"])
        began = chosen.step
    losses: dict[int, float] = {}
    for step in range(began, stretch.last_step):
        if process.world.rank == 0 and stretch.mark and step + 1 == stretch.mark_step:
            while latest_step(store.root) is None:  # the save is asynchronous; the other ranks wait in a collective
                time.sleep(0.02)
            Path(stretch.mark).touch()
        trainable.clock.step = step
        inputs, num_targets = synthetic_inputs(case, mesh, step, process.device)
        trainable.clock.batch_samples = len(inputs.tokens) * mesh.dp.size
        optimizer.zero_grad()
        microbatches = inputs.split(config.train.micro_batch)
        loss = engine.train(microbatches, 1.0 / num_targets, optimizer.begin_last_microbatch)
        norm = optimizer.finish_grads()
        losses[step + 1] = loss.item() if engine.reports_loss and mesh.tp.rank == 0 else 0.0
        optimizer.step(norm, lr=config.optim.lr, max_norm=config.optim.clip_norm)
        if step + 1 == stretch.save_step:
            store.save(step + 1, optimizer.state_shards(), {"optimizer_steps": optimizer.step_count})
        if config.train.eval_interval_steps:
            with evaluating(list(engine.stages), case.table):
                engine.evaluate(microbatches[0])
    store.close()
    return StretchReport(began, losses, copies(optimizer.state_shards()))


@dataclass(frozen=True)
class Distance:
    """Largest relative differences between two runs; 0 means equal bit for bit.

    tensors: by kind; root mean square of the difference over that of the tensor. worst: "<kind>/<name>" of the tensor
    that differs most, "" if none does.
    """

    loss: float
    tensors: dict[str, float]
    worst: str

    @property
    def equal(self) -> bool:
        """Bit for bit."""
        return self.loss == 0.0 and not any(self.tensors.values())


@dataclass(frozen=True)
class Resumed:
    """A resume of the killed run. exact: whether every bit must be that of the run without a stop.

    began: steps that each rank found done. distance: from the run without a stop; None if a rank began elsewhere than
    at the checkpoint.
    """

    layout: Layout
    exact: bool
    began: set[int]
    distance: Distance | None

    @property
    def passed(self) -> bool:
        if self.distance is None or self.exact:
            return self.distance is not None and self.distance.equal
        return self.distance.loss <= OTHER_LOSS and max(self.distance.tensors.values()) <= OTHER_STATE


@dataclass(frozen=True)
class ResumeTrial:
    """One case, by local gloo processes: the run without a stop, the killed one, and those that go on from the latter.

    layout: what the killed run uses. steps: before the save, and as many after it. root: a folder that does not exist
    yet, for the checkpoints. timeout_seconds: for one run.
    """

    case: Case
    layout: Layout
    steps: int
    root: Path
    timeout_seconds: float

    @property
    def _killed(self) -> Path:
        return self.root / "killed"

    def run(self, others: Sequence[Layout]) -> Iterator[Resumed]:
        """The resume at the same layout, bit for bit; then, in FP32 compute, those at `others`."""
        self.root.mkdir(parents=True)
        reference = self._train(self.layout, self.root / "whole")
        self._kill()
        yield self._resume(self.layout, reference, exact=True)
        if self.case.name == "fp32":
            for layout in others:
                yield self._resume(layout, reference, exact=False)

    def _train(self, layout: Layout, root: Path) -> list[StretchReport]:
        stretch = Stretch(str(root), self.steps, 2 * self.steps)
        return run_local(
            run_stretch, layout.world_size, self.case, layout.parallel, stretch, timeout_seconds=self.timeout_seconds
        )

    def _kill(self) -> None:
        """Ends in the second step after the save at the earliest, when the checkpoint is complete."""
        mark = self.root / "mark"
        kill_local(
            run_stretch,
            self.layout.world_size,
            self.case,
            self.layout.parallel,
            Stretch(str(self._killed), self.steps, 100_000, str(mark), self.steps + 2),
            when=mark.exists,
            timeout_seconds=self.timeout_seconds,
        )

    def _resume(self, layout: Layout, reference: list[StretchReport], *, exact: bool) -> Resumed:
        root = self.root / f"resumed-{layout.name.replace(' ', '-')}-{exact}"
        shutil.copytree(self._killed, root)
        resumed = self._train(layout, root)
        began = {report.began for report in resumed}
        return Resumed(layout, exact, began, distance(reference, resumed) if began == {self.steps} else None)


def distance(reference: Sequence[StretchReport], resumed: Sequence[StretchReport]) -> Distance:
    """The steps that `resumed` made, and the state after the last."""
    losses = [total_losses(reports) for reports in (reference, resumed)]
    loss = max(abs(losses[0][step] - value) / abs(losses[0][step]) for step, value in losses[1].items())
    kinds = sorted({kind for report in reference for shard in report.state for kind in shard.tensors}, reverse=True)
    errors = {f"{kind}/{name}": error for kind in kinds for name, error in _errors(reference, resumed, kind).items()}
    largest = max(errors, key=lambda key: errors[key])
    tensors = {kind: max(error for key, error in errors.items() if key.startswith(f"{kind}/")) for kind in kinds}
    return Distance(loss, tensors, largest if errors[largest] else "")


def _errors(reference: Sequence[StretchReport], resumed: Sequence[StretchReport], kind: str) -> dict[str, float]:
    """Relative difference of each logical tensor; infinite where it is not finite."""
    expected, actual = (
        assemble((shard for report in reports for shard in report.state if kind in shard.tensors), kind)
        for reports in (reference, resumed)
    )
    assert expected.keys() == actual.keys(), f"tensors differ: {sorted(expected.keys() ^ actual.keys())[:5]}"
    errors = {}
    for name, whole in expected.items():
        difference = (whole.double() - actual[name].double()).square().mean().sqrt()
        error = float(difference / whole.double().square().mean().sqrt().clamp(min=1e-30))
        errors[name] = 0.0 if whole.equal(actual[name]) else error if error == error else float("inf")
    return errors


def total_losses(reports: Sequence[StretchReport]) -> dict[int, float]:
    """The loss of each step, from the parts of all ranks."""
    return {step: sum(report.losses[step] for report in reports) for step in reports[0].losses}
