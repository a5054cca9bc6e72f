"""A LogicalParameter stays one: in modules, under new data, on the meta device, as a fake, in copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fp4.comm.parameter import LogicalParameter, logical_parameters
from megatron_fp4.comm.rect import Placement, Rectangle

PLACEMENT = Placement((Rectangle("q", (8, 3), (4, 0), (4, 3)), Rectangle("k", (4, 3), (2, 0), (2, 3))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = LogicalParameter(torch.arange(18.0).view(6, 3), PLACEMENT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def assert_logical(parameter: object) -> None:
    assert isinstance(parameter, LogicalParameter)
    assert isinstance(parameter, nn.Parameter)
    assert parameter.placement == PLACEMENT


def test_in_a_module() -> None:
    model = Model()
    (parameter,) = logical_parameters(model)
    assert parameter is model.weight
    assert_logical(parameter)
    assert type(parameter.detach()) is type(parameter + 1) is type(parameter[1:]) is torch.Tensor
    model.load_state_dict({"weight": torch.ones(6, 3)})
    assert torch.equal(model.state_dict()["weight"], torch.ones(6, 3))
    assert_logical(model.bfloat16().weight)


def test_under_new_data_with_gradient_and_hooks() -> None:
    model = Model()
    flat = torch.ones(20)
    model.weight.data = flat[:18].view(6, 3)
    seen = []
    model.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter))
    model(torch.ones(2, 3)).sum().backward()
    assert seen[0] is model.weight
    assert_logical(seen[0])
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.full((6, 3), 2.0))
    assert model.weight.data_ptr() == flat.data_ptr(), "the values were copied"
    assert model.weight.main_grad is None, "nobody gave it a place for its gradient"


def test_on_the_meta_device_and_as_a_fake() -> None:
    assert_logical(LogicalParameter(torch.empty(6, 3, device="meta"), PLACEMENT))
    with FakeTensorMode():
        assert_logical(LogicalParameter(torch.empty(6, 3), PLACEMENT))


def test_copies_have_the_place_and_no_optimizer() -> None:
    model = Model()
    model.weight.main_grad, model.weight.grad_ready = torch.zeros(6, 3), lambda: None
    model.weight.requires_grad_(False)
    copied = copy.deepcopy(model)
    for parameter in (copied.weight, pickle.loads(pickle.dumps(model.weight))):
        assert_logical(parameter)
        assert torch.equal(parameter, model.weight)
        assert parameter.data_ptr() != model.weight.data_ptr()
        assert (parameter.main_grad, parameter.grad_ready) == (None, None), "it would add to another's gradient"
    assert not copied.weight.requires_grad
    shared = copy.deepcopy([model.weight, model.weight])
    assert shared[0] is shared[1], "a table that two stages share would become two"


def test_what_does_not_say_where_it_lies() -> None:
    assert not isinstance(nn.Parameter(torch.ones(3)), LogicalParameter)
    assert not isinstance(torch.ones(3), LogicalParameter)
    with pytest.raises(TypeError, match=r"parameter 0\.weight is no LogicalParameter"):
        list(logical_parameters(nn.Sequential(nn.Linear(2, 2))))
