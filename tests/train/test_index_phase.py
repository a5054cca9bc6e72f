"""Epoch indices are built in the phase that may take an hour, and not in a step's eight minutes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.mesh import Group
from megatron_fp4.data.order import samples
from megatron_fp4.train.build import _build_indices, build
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.phases import Phases
from megatron_fp4.train.trainer import Attempt
from tests.helpers.tiny_run import tiny_run, write_toy_shard


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
    next(iter(trained.evaluations[0]))
    assert len(seen) == 3, "a step or an evaluation had to build one"


def test_a_folder_that_takes_no_index_is_refused_after_all_have_come() -> None:
    """A rank that left at once would let the others wait for it for an hour."""
    came: list[str] = []
    rendezvous = SimpleNamespace(wait_for_all=lambda name, seconds: came.append(name))
    process: Any = SimpleNamespace(rendezvous=rendezvous, world=Group.single("world"))

    def build_indices(samples: int) -> None:
        raise ValueError("data.index_cache: no room")

    loader: Any = SimpleNamespace(build_indices=build_indices)
    with pytest.raises(ValueError, match=r"rank 0: data\.index_cache: no room"):
        _build_indices((loader, []), 0, process)
    assert came == ["its indices"]


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
