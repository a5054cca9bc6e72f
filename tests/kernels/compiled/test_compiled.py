"""The kernels as GPUs would get them: the instructions that are meant, and none that would change bits or trap."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.kernels.compiled.cross_compile import Build, build, gemms, quantizers

PAPER = ("amax, RHT", "rows, stochastic", "columns, RHT, stochastic", "weight 16x16, both")
"""What is compiled for every target: these contain what a linear launches. The others only for 100."""
TARGETS = (80, 90, 100, 103, 120)
ALL_CASES = [
    (capability, name)
    for capability in TARGETS
    for name in quantizers(capability)
    if name in PAPER or capability == 100
]
PRODUCTS = [(capability, name) for capability in TARGETS for name in gemms(capability)]

MMA = {
    (80, "gemm"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    (90, "gemm"): r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.f16\.f16",
    (100, "gemm"): r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.block16",
    (103, "gemm"): r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.block16",
    (120, "gemm"): r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X",
    (80, "gemm, mxfp4"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    (90, "gemm, mxfp4"): r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.bf16\.bf16",
    (100, "gemm, mxfp4"): r"tcgen05\.mma\.cta_group::1\.kind::mxf4\.block_scale\.block32",
    (103, "gemm, mxfp4"): r"tcgen05\.mma\.cta_group::1\.kind::mxf4\.block_scale\.block32",
    (120, "gemm, mxfp4"): r"mma\.sync\.aligned\.m16n8k64.*scale_vec::2X.*ue8m0",
    (90, "gemm, mxfp8"): r"wgmma\.mma_async\.sync\.aligned\.m64n128k16\.f32\.bf16\.bf16",
    (100, "gemm, mxfp8"): r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale\.block32",
    (103, "gemm, mxfp8"): r"tcgen05\.mma\.cta_group::1\.kind::mxf8f6f4\.block_scale\.block32",
    (120, "gemm, mxfp8"): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.kind::mxf8f6f4\.block_scale",
}
"""The instruction of the tensor cores; Wgrad and TMA have that of "gemm"."""


def print_line(capability: int, name: str, built: Build) -> None:
    """A line of the table of docs/kernels.md (pytest -s)."""
    memory = f"{built.shared / 1024:.0f} KiB" + (f", {built.tensor_memory} columns" if built.tensor_memory else "")
    print(
        f"\n| sm_{capability} | {name} | {built.registers} | {built.spills} | {memory} | {built.instructions} |", end=""
    )


@pytest.mark.parametrize(("capability", "name"), ALL_CASES, ids=str)
def test_quantizers(capability: int, name: str) -> None:
    built = build(quantizers(capability)[name], capability)
    print_line(capability, name, built)
    assert built.faults(capability) == []
    if "amax" in name:
        assert "atom.global" in built.ptx or "red.global" in built.ptx
        assert re.search(r"max\.s32|redux", built.ptx), "a float maximum drops NaN"
    else:
        assert "div.rn.f32" in built.ptx or name == "words", "the only division that is IEEE's"
    nearest = not any(word in name for word in ("amax", "words", "stochastic", "mxfp8"))
    assert ("cvt.rn.satfinite.e2m1x2.f32" in built.ptx) == (nearest and capability >= 100)


@pytest.mark.parametrize(("capability", "name"), PRODUCTS, ids=str)
def test_products(capability: int, name: str) -> None:
    built = build(gemms(capability)[name], capability)
    print_line(capability, name, built)
    assert built.faults(capability) == []
    kind = name if "mxfp" in name else "gemm"
    assert re.search(MMA[capability, kind], built.ptx)
    if "TMA" in name:
        assert "cp.async.bulk.tensor" in built.ptx
        if capability < 120:
            assert "tcgen05.cp.cta_group::1.warpx4.32x128b" in built.ptx, "scales go to tensor memory by themselves"


# What the assertions above are for: each fault is planted once.


def test_contraction_is_seen() -> None:
    """Without the launch option, `main_grad + product` becomes one operation with other bits."""
    case = gemms(120)["gemm, Wgrad"]
    assert "fma" in build(case, 120, enable_fp_fusion=True).faults(120)


def test_too_much_tensor_memory_is_seen() -> None:
    """What ptxas then makes is one trap instruction; the compiler says nothing."""
    built = build(gemms(100)["gemm"], 100)
    assert "tensor memory" in replace(built, tensor_memory=576).faults(100)
    assert "shared memory" in replace(built, shared=1 << 20).faults(100)
    assert "spills" in replace(built, spills=1).faults(100)
    assert "trap" in replace(built, sass="BPT.TRAP", instructions=3).faults(100)


def test_an_approximate_division_and_flushed_denormals_are_seen() -> None:
    built = build(quantizers(90)["words"], 90)
    for text, fault in (("div.full.f32 %f1, %f2, %f3;", "div.full"), ("add.ftz.f32 %f1, %f2, %f3;", "ftz")):
        assert fault in replace(built, ptx=built.ptx + text).faults(90)
