"""Golden vectors: what Transformer Engine's own `te.Linear` computed (see tests/data/README.md), bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import QuantizedTensor, quantize_nvfp4, random_hadamard
from megatron_fp4.precision import (
    EmulatedBackend,
    LinearSite,
    StepClock,
    WeightCache,
    nvfp4_paper,
    quantized_linear,
)
from megatron_fp4.precision.backends.reference import ReferenceBackend

FILE = np.load(Path(__file__).parent.parent / "data" / "te_2_20_2_linear.npz")
CASES = sorted({name.split("/")[0] for name in FILE.files})


def bf16(name: str) -> Tensor:
    return torch.from_numpy(FILE[name].view(np.int16).copy()).view(torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", [EmulatedBackend(), ReferenceBackend()], ids=["emulated", "reference"])
def test_linear_reproduces_transformer_engine(case: str, backend: EmulatedBackend) -> None:
    """A difference in y, dx or dw: an operand, the scaling of the product or its rounding is not TE's."""
    x, dy = bf16(f"{case}/x").requires_grad_(), bf16(f"{case}/dy")
    weight = torch.nn.Parameter(bf16(f"{case}/w"))
    single = Group.single()
    site = LinearSite(case, single, single, single, *(torch.arange(size) for size in weight.shape))
    y = quantized_linear(
        x,
        weight,
        rows=torch.arange(x.shape[0]),
        site=site,
        precision=nvfp4_paper(stochastic=False),
        backend=backend,
        clock=StepClock(seed=1),
        cache=WeightCache(),
    )
    y.backward(dy)
    assert weight.grad is not None
    for name, ours in (("y", y), ("dx", x.grad), ("dw", weight.grad)):
        differing = (ours != bf16(f"{case}/{name}")).sum().item()
        assert differing == 0, f"{name}: {differing} of {ours.numel()} elements differ"


@pytest.mark.parametrize("case", CASES)
def test_codes_scales_and_amax(case: str) -> None:
    """A difference: row-wise, transformed column-wise or square-tile quantization is not TE's."""
    x, w = bf16(f"{case}/x"), bf16(f"{case}/w")
    ours: dict[str, QuantizedTensor] = {
        "x_row": quantize_nvfp4(x),
        "x_col_rht": quantize_nvfp4(random_hadamard(x.T.contiguous())),
        "w_2d": quantize_nvfp4(w, tile=(16, 16)),
    }
    for name, quantized in ours.items():
        codes = torch.from_numpy(FILE[f"{case}/{name}_codes"])
        theirs = QuantizedTensor(codes, quantized.scales, quantized.amax).operand()
        assert torch.equal(quantized.operand(), theirs), f"{name}: codes"  # -0 equals +0
        assert np.array_equal(quantized.scales.view(torch.uint8).numpy(), FILE[f"{case}/{name}_scales"]), (
            f"{name}: scales"
        )
        assert quantized.amax is not None
        assert quantized.amax.item() == FILE[f"{case}/{name}_amax"].item(), f"{name}: amax"
