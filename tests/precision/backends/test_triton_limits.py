"""What `precision.backend=triton` refuses, says at start and plans with, on a machine without triton and GPU.

That it computes the right numbers: tests/kernels/.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from megatron_fp4.models.block import model_linears
from megatron_fp4.planning.memory import weight_copy_bytes
from megatron_fp4.planning.stand_ins import SizedBackend
from megatron_fp4.precision import EmulatedBackend, Format, LinearPrecision, Operand, nvfp4_paper
from megatron_fp4.precision.backends import copies_of, triton_limits
from megatron_fp4.precision.backends.choose import check_backend_shapes, make_backend
from megatron_fp4.precision.backends.triton_limits import check_triton_device, emulated_gemms
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.recipes import RECIPES, nvfp4_ms_eden
from megatron_fp4.precision.spec import Fprop
from tests.models.test_count import load
from tests.precision.backends.test_emulated import origin


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_limits, "interpreted", lambda: False)


def config(**recipes: LinearPrecision) -> PrecisionConfig:
    return PrecisionConfig(BackendName.triton, recipes=recipes)


def test_refused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package triton: pip install 'megatron-fp4\[kernels\]'"):
        make_backend(config(r=nvfp4_paper()))


def test_refused_on_a_cpu_unless_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"torch sees none: set TRITON_INTERPRET=1 .*, or use precision\.backend="):
        make_backend(config(r=nvfp4_paper()))
    with pytest.raises(ValueError, match="this run is on cpu: set TRITON_INTERPRET=1"):
        check_triton_device(torch.device("cpu"))
    monkeypatch.setattr(triton_limits, "interpreted", lambda: True)
    check_triton_device(torch.device("cpu"))


def test_refused_on_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer, this one has 7\.5"):
        make_backend(config(r=nvfp4_paper()))


def test_what_is_emulated_is_said() -> None:
    """Nothing of three recipes; every GEMM of the others, with its reason."""
    assert emulated_gemms(config(nvfp4=RECIPES["nvfp4"], mxfp4=RECIPES["mxfp4"], mxfp8=RECIPES["mxfp8"])) == []
    fp8 = emulated_gemms(config(fp8=RECIPES["fp8"]))
    assert fp8[0] == "recipe fp8, fprop: x has format=fp8_block"
    long = nvfp4_paper().with_operands(lambda o: replace(o, rht_size=128) if o.rht_size else o)
    assert emulated_gemms(config(long=long)) == ["recipe long, wgrad: dy has rht_size=128, more than a block of 16"]
    assert emulated_gemms(config(eden=nvfp4_ms_eden())) == [
        "recipe eden, dgrad: dy has rounding=ms_eden",
        "recipe eden, wgrad: dy has rounding=ms_eden",
    ]
    half = LinearPrecision(fprop=Fprop(x=Operand(), w=Operand(Format.nvfp4)))
    assert emulated_gemms(config(half=half)) == ["recipe half, fprop: operands in bf16 and nvfp4"]
    assert emulated_gemms(replace(config(fp8=RECIPES["fp8"]), backend=BackendName.emulated)) == []


def test_more_tokens_than_a_launch_takes() -> None:
    plan = PrecisionPlan(replace(config(r=nvfp4_paper()), use="r"), model_linears(load("gpt_tiny")))
    check_backend_shapes(plan, [], tp=1, tokens=4_194_240)
    with pytest.raises(ValueError, match=r"at most 4,194,240 rows at once, and a microbatch has 4,194,256 tokens"):
        check_backend_shapes(plan, [], tp=1, tokens=4_194_256)


def test_a_tensor_without_elements_is_refused() -> None:
    """By every backend, in the same words: an empty microbatch has no largest element."""
    x = torch.empty(0, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"operand dy of dgrad has local shape \(0, 64\), which has no element"):
        EmulatedBackend().quantize(x, origin(x), copies_of(nvfp4_paper())["dy"])


def test_the_plan_counts_codes() -> None:
    """4.5 bits an element for a copy, while it waits too; what is emulated is as large as BF16."""
    assert weight_copy_bytes(nvfp4_paper(), BackendName.triton, 2) == 2 * 0.5625
    backend = SizedBackend(BackendName.triton, on_gpu=True)
    x = torch.empty(128, 256, dtype=torch.bfloat16, device="meta")
    _, saved = backend.quantize(x, origin(x), copies_of(nvfp4_paper())["x"])
    assert saved.tensors[0].nbytes == 128 * 256 * 0.5625
    fp8_x, w = copies_of(RECIPES["fp8"])["x"][0], copies_of(nvfp4_paper())["w"][0]
    (emulated,), (coded,) = backend.quantize(x, origin(x), [fp8_x]), backend.quantize(x, origin(x), [w])
    assert emulated.tensors[0].nbytes == x.nbytes
    assert backend.matmul(emulated, coded, out_dtype=torch.bfloat16).shape == (128, 128)
