"""Every operand that the kernels make, against the readable definition: codes, scales and amax, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.kernels import arithmetic, quantize
from megatron_fp4.kernels.layout import row_major_scales, swizzled_scales
from megatron_fp4.kernels.values import Target
from megatron_fp4.numerics import formats
from megatron_fp4.precision import NonFiniteError, nvfp4_paper
from megatron_fp4.precision.backends import Copy, NonFiniteWatch, OperandOrigin, QuantizedOperand, copies_of
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.triton import TritonBackend
from megatron_fp4.precision.backends.triton_limits import obstacle
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.precision.operand import Operand
from megatron_fp4.precision.selftest.parts import first_mismatch, reference_parts
from tests.kernels.inputs import hostile
from tests.kernels.interpreted import device_functions
from tests.kernels.interpreter_repairs import device_code
from tests.precision.backends.test_emulated import OPERANDS

CODED = [operand for operand in OPERANDS if operand.quantized and not obstacle(operand)]
BACKEND, REFERENCE = TritonBackend(PrecisionConfig(compile=False)), ReferenceBackend()
BF16, PAPER = torch.bfloat16, copies_of(nvfp4_paper())


def origin(x: Tensor, name: str = "dy") -> OperandOrigin:
    """Rows beyond 2^33: both halves of an index are hashed."""
    rows, cols = (torch.arange(size) for size in x.shape)
    return OperandOrigin("blocks.0.mlp.up", name, rows + 2**33 + 5, cols + 32, Group.single(), seed=1, step=3)


def as_bytes(operand: QuantizedOperand) -> list[Tensor]:
    return [(part if part.dim() else part.view(1)).contiguous().view(torch.uint8) for part in operand.tensors]


def assert_equal(x: Tensor, copies: Sequence[Copy], what: str, name: str = "dy") -> None:
    """-0 and 0 count as different."""
    ours, expected = (backend.quantize(x, origin(x, name), copies) for backend in (BACKEND, REFERENCE))
    for copy, one, other in zip(copies, ours, expected, strict=True):
        for part, left, right in zip(("codes", "scales", "amax"), as_bytes(one), as_bytes(other), strict=False):
            assert torch.equal(left, right), f"{what}: {part} of {copy.gemm} along {copy.along}"
        assert len(one.tensors) == len(other.tensors)


@pytest.mark.parametrize(
    ("operand", "dtype"),
    [(operand, BF16) for operand in CODED]
    + [(copy.operand, torch.float32) for pair in PAPER.values() for copy in pair],
    ids=str,
)
def test_every_operand_equals_the_reference(operand: Operand, dtype: torch.dtype) -> None:
    """Also where the last program has blocks and lines that no tensor has; FP32 is not rounded to BF16."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(160, 288, generator=gen) / torch.randn(160, 288, generator=gen).abs().clamp(min=0.01)
    assert_equal(x.to(dtype), [Copy("wgrad", operand, 0)], "")
    assert_equal(x.to(dtype), [Copy("wgrad", operand, 1)], "")


@pytest.mark.parametrize("tensor", ["x", "w", "dy"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 112), (272, 1040)], ids=str)
def test_the_papers_operands_on_hostile_inputs(tensor: str, shape: tuple[int, int]) -> None:
    inputs = hostile(*shape)
    if shape == (272, 1040):
        inputs = {name: inputs[name] for name in ("every bf16",)}
    for name, x in inputs.items():
        if name == "every bf16" and tensor != "w":  # the transform overflows: see the test of NaN
            x = torch.where(x.abs() < 2.0**120, x, 1.0).bfloat16()
        assert_equal(x, PAPER[tensor], name, tensor)


def test_lines_need_not_be_a_multiple_of_anything() -> None:
    x = hostile(37, 112)["rows of all sizes"]
    assert_equal(x, [Copy("fprop", Operand(CODED[0].format), 1)], "rows")
    assert_equal(x.T.contiguous(), [Copy("wgrad", Operand(CODED[0].format), 0)], "columns")


@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("tensor", ["x", "w"])
def test_the_largest_element_may_be_the_first_or_the_last(corner: tuple[int, int], tensor: str) -> None:
    x = hostile(48, 112)["normal"]
    x[corner] = 1000.0
    assert_equal(x, PAPER[tensor], str(corner), tensor)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_a_power_of_two_is_no_smaller_than_its_target(name: str) -> None:
    """FP32 maxima beside every 6 * 2^n and 448 * 2^n, which BF16 has no neighbours of: the quotient is 2^n + 1 ulp."""
    operand = next(o for o in CODED if o.format.name == name and not o.rht_size)
    largest = torch.tensor([6.0, 448.0])[:, None] * torch.exp2(torch.arange(-8.0, 8.0))
    near = largest.view(torch.int32)[..., None] + torch.arange(-2, 2, dtype=torch.int32)
    x = near.view(torch.float32).reshape(-1, 1).expand(-1, 32).contiguous()
    assert_equal(x, [Copy("fprop", operand, 1)], "rows")
    assert_equal(x.T.contiguous(), [Copy("wgrad", operand, 0)], "columns")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("tensor", ["x", "w", "dy"])
def test_nan_and_inf_are_seen(bad: float, tensor: str) -> None:
    """A float maximum would drop NaN, and a rounding by integers would make a number of it."""
    x = torch.randn(64, 64).bfloat16()
    x[13, 17] = bad
    with pytest.raises(NonFiniteError):
        BACKEND.quantize(x, origin(x, tensor), PAPER[tensor])
    watch = NonFiniteWatch()
    TritonBackend(PrecisionConfig(compile=False), watch).quantize(x, origin(x, tensor), PAPER[tensor])
    assert [event.operand for event in watch.take()] == [tensor]
    mx = [Copy("fprop", next(o for o in CODED if o.format.name == "mxfp4"), 1)]
    with pytest.raises(NonFiniteError):
        BACKEND.quantize(x, origin(x), mx)


def test_scales_in_the_layout_of_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes in other places, for both quantizers, with lines and blocks that fill no tile of 128x4."""
    x = torch.randn(144, 80).bfloat16()
    on_cpu = Target.of(torch.device("cpu"))
    for operand in (PAPER["x"][0].operand, PAPER["w"][0].operand, PAPER["dy"][1].operand):
        for along in (0, 1):
            copy = Copy("wgrad", operand, along)
            (expected,) = BACKEND.quantize(x, origin(x), [copy])
            backend = TritonBackend(PrecisionConfig(compile=False))
            blackwell = Target.of_capability((10, 0), 2)
            monkeypatch.setattr(Target, "of", staticmethod(lambda device, target=blackwell: target))
            (swizzled,) = backend.quantize(x, origin(x), [copy])
            monkeypatch.setattr(Target, "of", staticmethod(lambda device, target=on_cpu: target))
            assert torch.equal(swizzled.tensors[0], expected.tensors[0])
            scales = row_major_scales(swizzled.tensors[1], *expected.tensors[1].shape)
            assert torch.equal(scales, expected.tensors[1])
            assert torch.equal(swizzled_scales(scales), swizzled.tensors[1]), "what no operand has must be zero"


@pytest.mark.parametrize("tensor", ["x", "w", "dy"])
def test_the_code_that_a_blackwell_gets(tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles, its layout of scales and its instructions, with the codes and scales of the reference."""
    blackwell = Target.of_capability((10, 0), 2)
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: blackwell))
    backend = TritonBackend(PrecisionConfig(compile=False))
    with device_code():
        for name in ("ties", "denormals", "all exponents", "zero blocks, -0"):
            x = hostile(48, 112)[name]
            ours, expected = (one.quantize(x, origin(x, tensor), PAPER[tensor]) for one in (backend, REFERENCE))
            for copy, left, right in zip(PAPER[tensor], ours, expected, strict=True):
                parts = (reference_parts(left), reference_parts(right))
                assert first_mismatch(*parts, copy, signed_zero=True) is None, f"{name}: {copy.gemm}"


def test_codes_and_scales_of_any_number() -> None:
    """E4M3, E2M1 and BF16 from random FP32 bits and from every decision point and its neighbours."""
    gen = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=gen).to(torch.int32)
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    points = torch.cat([e4m3, (e4m3[1:] + e4m3[:-1]) / 2, torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    near = (points.view(torch.int32)[:, None] + torch.arange(-4, 5, dtype=torch.int32)).flatten().clamp(min=0)
    x = torch.cat([bits, near, near | -(2**31)]).view(torch.float32)
    x = x[x.isfinite()][-(1 << 16) :]
    out = {name: torch.empty(len(x), dtype=torch.int32) for name in ("e4m3", "e2m1", "bf16")}
    device_functions.encode[(1,)](x, *out.values(), len(x), False)
    assert torch.equal(out["e4m3"].to(torch.uint8), formats.encode_e4m3(x.abs()).view(torch.uint8))
    assert torch.equal(out["e2m1"].to(torch.uint8), formats.encode_e2m1(x))
    assert torch.equal(out["bf16"].view(torch.float32), x.bfloat16().float())


# A wrong kernel must be seen: each plants one fault where a test above looks.


@pytest.mark.parametrize(
    ("place", "name", "fault"),
    [
        (arithmetic, "e2m1_code", device_functions.half_up_code),
        (arithmetic, "e4m3_code", device_functions.truncated_scale),
        (arithmetic, "mix", device_functions.weak_mix),
    ],
    ids=["ties away from zero", "a truncated scale", "another hash"],
)
def test_a_planted_fault_is_seen(place: object, name: str, fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arithmetic, quantize.rows_kernel.fn, quantize.lanes_kernel.fn):
        scope = vars(module) if module is arithmetic else module.__globals__
        if name in scope:
            monkeypatch.setitem(scope, name, fault)
    with pytest.raises(AssertionError, match=name):
        assert_equal(hostile(48, 112)["ties"], [*PAPER["x"], *PAPER["dy"]], name)
