"""Logical tensors in and out of a model, of which a rank may hold a part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.comm.mesh import Group
from megatron_fp4.interop.logical import read_logical, write_logical
from megatron_fp4.layers import ColumnParallelLinear, RowParallelLinear, lab
from megatron_fp4.models.foreign.families import expect_tensor

TP = Group("tp", (0, 1), 1, object())  # type: ignore[arg-type]


def test_a_rank_is_filled_with_its_part() -> None:
    """Rows of the wrong rank, or of the fused weight instead of each of its parts."""
    context = replace(lab(), tp=TP)
    logical = {f"l.{part}.weight": torch.randn(4, 6) for part in "qk"}
    column = ColumnParallelLinear("l", 6, {"q": 4, "k": 4}, context, std=1.0)
    write_logical(column, logical)
    assert torch.equal(column.weight, torch.cat([logical["l.q.weight"][2:], logical["l.k.weight"][2:]]))
    row = RowParallelLinear("l.q", 6, 4, context, std=1.0)
    write_logical(row, logical)
    assert torch.equal(row.weight, logical["l.q.weight"][:, 3:])
    for linear in (column, row):
        with pytest.raises(ValueError, match=r"a part of the tensor"):
            read_logical(linear)


def test_a_whole_model_is_read_without_a_copy() -> None:
    linear = ColumnParallelLinear("l", 6, {"q": 4, "k": 2}, lab(), std=1.0)
    logical = read_logical(linear)
    assert {name: tuple(tensor.shape) for name, tensor in logical.items()} == {
        "l.q.weight": (4, 6),
        "l.k.weight": (2, 6),
    }
    assert logical["l.k.weight"].data_ptr() == linear.weight[4:].data_ptr()


def test_a_tensor_that_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"tensor a is missing; it should have shape \(2,\)"):
        expect_tensor({}, "a", (2,))
    with pytest.raises(ValueError, match=r"tensor a has shape \(3,\), the model's configuration says \(2,\)"):
        expect_tensor({"a": torch.zeros(3)}, "a", (2,))
