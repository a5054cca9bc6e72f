"""Golden vectors: what Transformer Engine's own `te.Linear` computed (see tests/golden/README.md), bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import QuantizedTensor, quantize_nvfp4, random_hadamard
from megatron_fp4.precision import (
    EmulatedBackend,
    Sharding,
    StepClock,
    WeightCache,
    nvfp4_paper,
    quantized_linear,
)
from megatron_fp4.precision.backends import Backend, product
from megatron_fp4.precision.backends.reference import ReferenceBackend
from tests.precision.te import te_cases

DATA = Path(__file__).parents[2] / "golden"
FILE, STACKS = np.load(DATA / "te_2_20_2_linear.npz"), np.load(DATA / "te_2_20_2_stacks.npz")
CASES = sorted({name.split("/")[0] for name in FILE.files})


def bf16(name: str, file: Any = FILE) -> Tensor:
    return torch.from_numpy(file[name].view(np.int16).copy()).view(torch.bfloat16)


def single_linear(case: str, backend: Backend) -> dict[str, Tensor]:
    """y, dx and dw of a case of the file of single linears."""
    x, dy = bf16(f"{case}/x").requires_grad_(), bf16(f"{case}/dy")
    weight = torch.nn.Parameter(bf16(f"{case}/w"))
    single = Group.single()
    y = quantized_linear(
        x,
        weight,
        rows=torch.arange(x.shape[0]),
        sharding=Sharding(case, single, single, single, *(torch.arange(size) for size in weight.shape)),
        precision=nvfp4_paper(stochastic=False),
        backend=backend,
        clock=StepClock(seed=1),
        cache=WeightCache(),
    )
    y.backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": weight.grad}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("backend", "native"),
    [(EmulatedBackend(), True), (EmulatedBackend(), False), (ReferenceBackend(), False)],
    ids=["emulated", "emulated-widened", "reference"],
)
def test_linear_reproduces_transformer_engine(
    case: str, backend: EmulatedBackend, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference in y, dx or dw: an operand, the scaling of the product or its rounding is not TE's.

    native: whether the CPU's own BF16 GEMM multiplies, or the FP32 one.
    """
    monkeypatch.setattr(product, "cpu_multiplies_bf16", lambda: native)
    for name, ours in single_linear(case, backend).items():
        differing = (ours != bf16(f"{case}/{name}")).sum().item()
        assert differing == 0, f"{name}: {differing} of {ours.numel()} elements differ"


@pytest.mark.parametrize("case", te_cases.CASES)
@pytest.mark.parametrize("backend", [EmulatedBackend(), ReferenceBackend()], ids=["emulated", "reference"])
def test_stacks_of_linears_reproduce_transformer_engine(case: str, backend: EmulatedBackend) -> None:
    """Other recipes, BF16 linears and directions, inputs over many magnitudes, two and three linears in a row."""
    stored = {name.split("/")[1]: bf16(name, STACKS) for name in STACKS.files if name.startswith(f"{case}/")}
    results = te_cases.run_ours(case, backend, stored)
    assert set(results) | {"x", "dy", *(name for name in stored if name[0] == "w")} == set(stored), (
        "made with other cases: run real_te_check.py --save again"
    )
    for name, ours in results.items():
        differing = (ours != stored[name]).sum().item()
        assert differing == 0, f"{name}: {differing} of {ours.numel()} elements differ"


def test_tensor_parallel_modules_have_amax_scope_shard() -> None:
    """As te_recipe says: real column- and row-parallel modules with sequence parallelism, on two ranks."""
    tensors = te_cases.inputs(te_cases.TENSOR_PARALLEL)
    for rank, results in enumerate(te_cases.run_ours_sharded(EmulatedBackend(), tensors)):
        for name, ours in results.items():
            assert torch.equal(ours, bf16(f"{te_cases.TENSOR_PARALLEL}_rank{rank}/{name}", STACKS)), f"{rank}: {name}"


def test_stored_inputs_are_those_of_the_cases() -> None:
    for case in te_cases.CASES:
        for name, value in te_cases.inputs(case).items():
            assert torch.equal(value, bf16(f"{case}/{name}", STACKS)), f"{case}/{name}: a new run would store others"


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
