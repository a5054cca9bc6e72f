"""SIGKILL during a save with Muon: what a resume finds is the state of one of the two steps, whole, and goes on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.checkpoint import CheckpointConfig, CheckpointStore
from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.optim import Zero1Optimizer
from tests.checkpoint.test_commit import killed_before, watched
from tests.optim.muon.test_update import config_of
from tests.optim.synthetic import contribute, exact_gradient, make_parameters

State = dict[str, Tensor]


def optimizer_after(steps: int, began: Path | None = None) -> tuple[Zero1Optimizer, int]:
    """An optimizer after `steps` steps, the first ones from a checkpoint below `began`; and where that began."""
    parameters = make_parameters()
    optimizer = Zero1Optimizer(parameters.items(), config_of(), ParallelMesh.single_process(), sequence_parallel=False)
    first = 0
    if began is not None:
        store = CheckpointStore(began, Group.single("world"), CheckpointConfig())
        chosen = store.choose()
        store.load(chosen, optimizer.state_shards())
        optimizer.after_load(first := chosen.step)
    for step in range(first, steps):
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            contribute(parameter, exact_gradient(name, tuple(parameter.shape), step, 0))
        optimizer.step(optimizer.finish_grads(), lr=1e-2, max_norm=1.0)
    return optimizer, first


def state_of(optimizer: Zero1Optimizer) -> State:
    shards = optimizer.state_shards()
    return {f"{kind}/{shard.where}": shard.read(kind).clone() for shard in shards for kind in shard.tensors}


def save(root: Path, optimizer: Zero1Optimizer) -> None:
    store = CheckpointStore(root, Group.single("world"), CheckpointConfig(asynchronous=False, keep_last=1))
    store.save(optimizer.step_count, optimizer.state_shards(), {})
    store.close()


def test_a_killed_save_leaves_momentum_and_masters_of_one_step(tmp_path: Path) -> None:
    earlier, later = optimizer_after(2)[0], optimizer_after(3)[0]
    expected = state_of(optimizer_after(5)[0])
    assert sum(key.startswith("momentum/") for key in expected) == 5
    save(tmp_path / "old", earlier)
    names: list[str] = []
    undo = watched(names.append)
    shutil.copytree(tmp_path / "old", tmp_path / "whole")
    save(tmp_path / "whole", later)
    undo()
    seen = set()
    for number in (*range(0, len(names) - 12, 9), *range(len(names) - 12, len(names) - 2, 3)):
        root = tmp_path / f"killed{number}"
        shutil.copytree(tmp_path / "old", root)
        status = killed_before(number, lambda root=root: save(root, later))  # type: ignore[misc]
        assert os.WIFSIGNALED(status), f"call {number} ({names[number]}) was not reached"
        resumed, began = optimizer_after(5, root)
        for key, tensor in state_of(resumed).items():
            assert torch.equal(tensor, expected[key]), f"killed before call {number} ({names[number]}): {key}"
        seen.add(began)
    assert seen == {2, 3}, "some kills must come before the commit and some after"
