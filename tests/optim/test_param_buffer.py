"""Modules wait for their own parameters, and for no others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim.layout import make_buckets
from megatron_fp4.optim.param_buffer import ParamBuffer


class Recorder:
    """Stands for a gather under way."""

    def __init__(self, index: int, log: list[int]) -> None:
        self.index, self.log = index, log

    def wait(self) -> None:
        self.log.append(self.index)


def build() -> tuple[nn.Sequential, ParamBuffer, list[int]]:
    """Three layers, one bucket each, last layer first; gathers pending for all."""
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    for index, layer in enumerate(model):
        layer.weight = LogicalParameter.whole(f"{index}.weight", layer.weight)
    buckets = make_buckets(model.named_parameters(), Group.single(), bucket_numel=1, sum_replicated_over_tp=False)
    buffer = ParamBuffer(buckets)
    log: list[int] = []
    buffer._pending = {index: Recorder(index, log) for index in range(3)}  # type: ignore[misc]
    return model, buffer, log


def test_each_module_waits_for_its_own_bucket_once() -> None:
    model, buffer, log = build()
    buffer.gather_beside_forward(model)
    model[0](torch.zeros(1, 8))
    assert log == [2], "the first layer lies in the last bucket and needs no other"
    model(torch.zeros(1, 8))
    assert log == [2, 1, 0], "a bucket was waited for twice, or not at all"


def test_wait_without_indices_completes_all() -> None:
    _, buffer, log = build()
    buffer.wait()
    assert sorted(log) == [0, 1, 2]


def test_parameters_keep_identity_values_and_share_memory_with_the_bucket() -> None:
    model, buffer, _ = build()
    weight = model[2].weight
    before = weight.detach().clone()
    buffer._pending.clear()
    assert isinstance(weight, nn.Parameter)
    assert weight.is_leaf
    masters: list[Tensor] = [part.clone() + 1 for part in buffer.parts]
    buffer.refresh(masters, wait=True)
    assert model[2].weight is weight, "hooks and caches keyed by the parameter would be lost"
    assert torch.equal(weight, before + 1)
