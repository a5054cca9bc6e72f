"""Golden vectors on the kernels: the operands of Transformer Engine's own `te.Linear` bit for bit, and its results.

Sums are the kernels' own, so a result may be rounded the other way (tests/golden/README.md says what the files are).
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from megatron_fp4.numerics import formats
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.backends import copies_of
from megatron_fp4.precision.backends.triton import TritonBackend
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.selftest.parts import Parts, first_mismatch, reference_parts
from tests.kernels.interpreted.test_operands import origin
from tests.precision.te import te_cases
from tests.precision.te.test_golden import CASES, FILE, STACKS, bf16, single_linear

BACKEND = TritonBackend(PrecisionConfig(compile=False))
STORED = {"x_row": ("x", 0), "x_col_rht": ("x", 1), "w_2d": ("w", 0)}
"""The copy of the paper's recipe that a stored operand is: its tensor and its place among the copies."""


def assert_near(results: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for name, ours in results.items():
        expected = stored[name].double()
        error = (ours.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < 2e-3, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES)
def test_single_linears(case: str) -> None:
    """Codes, scales and amax of x, of its transformed columns and of w; y, dx and dw."""
    for stored, (tensor, place) in STORED.items():
        x, copies = bf16(f"{case}/{tensor}"), copies_of(nvfp4_paper(stochastic=False))[tensor]
        codes, scales, amax = (
            torch.from_numpy(FILE[f"{case}/{stored}_{part}"]) for part in ("codes", "scales", "amax")
        )
        theirs = Parts(formats.unpack(codes), scales, amax.reshape(()))
        ours = reference_parts(BACKEND.quantize(x, origin(x, tensor), copies)[place])
        assert first_mismatch(theirs, ours, copies[place]) is None, stored
    assert_near(single_linear(case, BACKEND), {name: bf16(f"{case}/{name}") for name in ("y", "dx", "dw")})


@pytest.mark.parametrize("case", sorted(te_cases.CASES))
def test_stacks_of_linears(case: str) -> None:
    stored = {name.split("/")[1]: bf16(name, STACKS) for name in STACKS.files if name.startswith(f"{case}/")}
    assert_near(te_cases.run_ours(case, BACKEND, stored), stored)
