"""Epoch indices are built in the phase that may take an hour, and not in a step's eight minutes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.rendezvous import Rendezvous
from megatron_fp4.data import loader as loader_module
from megatron_fp4.data.order import samples
from megatron_fp4.train.build import build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.opened import OpenedData
from megatron_fp4.train.opened import build_indices as build_data_indices
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.run import Position
from megatron_fp4.train.trainer import Attempt
from tests.helpers.tiny_run import tiny_run, write_toy_shard
from tests.train.in_process import make_trainer


def test_indices_are_built_in_the_phase_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a source that only a later phase reads, and of the held-out set, too."""
    held, late = (write_toy_shard(tmp_path / name / name, seed=seed) for seed, name in ((1, "held"), (2, "late")))
    sources = f"{{name: toy, paths: ['{tmp_path}/shards/toy'], max_epochs: 0}}, {{name: late, paths: ['{late}']}}"
    run = tiny_run(
        tmp_path, "precision=bf16", f"data.sources=[{sources}]", f"data.evaluation=[{{name: held, paths: ['{held}']}}]",
        "train.eval_interval_steps=1",
        "data.phases=[{name: one, tokens: 2560, weights: {toy: 1}}, {name: two, weights: {toy: 1, late: 1}}]",
    )  # fmt: skip
    phases, seen = Phases(torch.device("cpu")), list[str]()
    right = samples.build_index

    def build_index(*arguments: Any) -> Any:
        seen.append(phases.current.name)
        return right(*arguments)

    monkeypatch.setattr(samples, "build_index", build_index)
    process = Process(Launch(), Group.single("world"), torch.device("cpu"))
    trained, _ = build(check_config(to_run_config(compose_config(run.overrides)), 1), process, phases)
    assert seen == ["index"] * 3, "one for each of toy, late and held"
    trained.loader.batch(0, 4)
    next(iter(trained.examiner.evaluations[0]))
    assert len(seen) == 3, "a step or an evaluation had to build one"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("data.index_cache: no room"), "rank 0: data.index_cache: no room"),
        (MemoryError("160 GB"), "rank 0: MemoryError: 160 GB"),
    ],
)
def test_whatever_fails_in_an_index_is_one_sentence_of_all_ranks(error: Exception, sentence: str) -> None:
    """A rank that left at once would let the others wait for it for an hour."""
    process: Any = SimpleNamespace(rendezvous=Rendezvous.alone(), world=Group.single("world"))

    def build_indices(samples: int) -> None:
        raise error

    loader: Any = SimpleNamespace(build_indices=build_indices)
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        build_data_indices(OpenedData(loader, [], []), 0, process)


class CountingRendezvous(Rendezvous):
    """One of a single rank. waits: at which calls of `next_step` all ranks wait for each other."""

    def __init__(self, position: Callable[[], Position]) -> None:
        super().__init__(Launch(), None)
        self.waits: list[int] = []
        self._position = position

    @contextmanager
    def together(self, name: str, timeout_seconds: float) -> Iterator[None]:
        assert timeout_seconds == 3600.0
        self.waits.append(self._position().step)
        yield


def test_all_wait_for_who_builds_the_next_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a quick node stood in the step's collectives, which are given up after eight minutes. They wait on the
    first step of all, and on each that reads an epoch that was not read before, whoever's rows it is in."""
    monkeypatch.setattr(loader_module, "QUICK_DOCUMENTS", 0)
    shard = write_toy_shard(tmp_path / "small" / "small", num_documents=9, seed=1)
    sources = f"{{name: toy, paths: ['{tmp_path}/shards/toy'], max_epochs: 0}}, {{name: small, paths: ['{shard}'], "
    run = tiny_run(
        tmp_path, "precision=bf16", f"data.sources=[{sources} max_epochs: 0}}]",
        "data.phases=[{name: one, weights: {toy: 1, small: 2}}]", "train.stop_after_steps=40",
    )  # fmt: skip
    trainer, _ = make_trainer(run.overrides)
    waits = trainer.run.rendezvous = CountingRendezvous(lambda: attempts[0].position)
    attempts: list[Attempt] = []
    right = Attempt.__enter__
    monkeypatch.setattr(Attempt, "__enter__", lambda self: attempts.append(self) or right(self))
    trainer.fit()
    loader, batch = trainer.run.loader, trainer.run.config.train.global_batch
    known: set[tuple[str, int]] = set()
    expected = []
    for step in range(attempts[0].position.step):
        read = {(o.source, p.epoch) for o in loader.origins(step * batch, batch) for p in o.pieces}
        if not read <= known:
            expected.append(step)
        known |= read
    assert len(expected) > 3, "too few epochs to show anything"
    assert waits.waits == expected


def test_a_batch_that_waits_for_an_index_is_in_its_phase() -> None:
    phases, loader = Phases(torch.device("cpu")), SimpleNamespace(waits_for_index=False)
    attempt: Any = SimpleNamespace(run=SimpleNamespace(loader=loader, phases=phases))
    phases.enter("data")
    Attempt._name_the_wait(attempt)
    assert phases.current.name == "data"
    loader.waits_for_index = True
    Attempt._name_the_wait(attempt)
    since = phases.current
    assert since.name == "index", "eight minutes for what may take an hour"
    Attempt._name_the_wait(attempt)
    assert phases.current is since, "it would never be taken for hung"
