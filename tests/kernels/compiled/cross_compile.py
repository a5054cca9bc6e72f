"""Kernels compiled for GPUs that are not there: PTX and SASS, and what must not be in them.

The wheel of Triton holds ptxas, cuobjdump and nvdisasm; no driver and no GPU take part.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_fp4.kernels.gemm import gemm_kernel, persistent_gemm_kernel
from megatron_fp4.kernels.lanes import lanes_kernel
from megatron_fp4.kernels.measure import amax_kernel, transformed_amax_kernel, words_kernel
from megatron_fp4.kernels.multiply import gemm_constants
from megatron_fp4.kernels.quantize import lanes_constants, lanes_tile, rows_constants
from megatron_fp4.kernels.rows import rows_kernel
from megatron_fp4.kernels.values import OPTIONS, Coding, Target

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
"""Largest shared memory of a program."""
TENSOR_MEMORY_COLUMNS = 512
FORBIDDEN = {"fma": r"\bfma\.rn\.f32", "div.full": r"\bdiv\.full", "ftz": r"\.ftz\b", "approx": r"\.approx\b"}

Types = dict[str, str]


@dataclass(frozen=True)
class Case:
    """One kernel with its argument types, constants and launch options."""

    kernel: Any
    types: Types
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """What came out: the texts, and the numbers of the table."""

    ptx: str
    sass: str
    registers: int
    shared: int
    tensor_memory: int
    spills: int
    instructions: int

    def faults(self, capability: int) -> list[str]:
        """Everything that would change bits, or that is no working kernel."""
        faults = [name for name, pattern in FORBIDDEN.items() if re.search(pattern, self.ptx)]
        faults += ["spills"] * (self.spills > 0)
        faults += ["shared memory"] * (self.shared > SHARED_BYTES[capability])
        faults += ["tensor memory"] * (self.tensor_memory > TENSOR_MEMORY_COLUMNS)
        return faults + ["trap"] * ("BPT.TRAP" in self.sass and self.instructions < 50)


def build(case: Case, capability: int, **options: Any) -> Build:
    """Compile for `sm_<capability>`; options: instead of those of every launch."""
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [
        (names.index(name),)
        for name, kind in case.types.items()
        if (kind.startswith("*") and "amax" not in name) or name in ("M", "N", "K", "n")
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs=case.constants,
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**OPTIONS, **case.options, **options}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        sass = _run("nvdisasm", "-c", cubin.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    operations = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", sass))
    return Build(
        ptx=re.sub(r"\n\s*\.section.*", "", compiled.asm["ptx"].split(".entry", 1)[1], flags=re.DOTALL),
        sass=sass,
        registers=int(registers[1]),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        spills=operations["STL"] + operations["LDL"],
        instructions=operations.total() - operations["NOP"],
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


NVFP4, TILES = Coding(2688.0, 16), Coding(2688.0, 16, square=True)
MXFP4, MXFP8 = Coding(0.0, 32), Coding(0.0, 32, bits=8)
SIZES = {"M": "i32", "K": "i32"}
ROWS = {"x_ptr": "*i16", "codes_ptr": "*u8", "scales_ptr": "*u8", "amax_ptr": "*fp32", "words_ptr": "*i32", **SIZES}
LANES = {
    **ROWS, "codes_ptr": "*i64", "turned_codes_ptr": "*u8", "turned_scales_ptr": "*u8", "signs": "i32",
}  # fmt: skip
REPORTED = {"amax_ptr": "*i32"}
PRODUCT = {"out_ptr": "*i16", "a_amax_ptr": "*fp32", "b_amax_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
POINTERS = {"a_ptr": "*u8", "a_scales_ptr": "*u8", "b_ptr": "*u8", "b_scales_ptr": "*u8", **PRODUCT}
TO_BF16, TO_MAIN_GRAD = {"ACCUMULATE": False, "ROUND": True}, {"ACCUMULATE": True, "ROUND": False}


def target_of(capability: int) -> Target:
    return Target.of_capability(divmod(capability, 10), 132)


def rows(how: Coding, capability: int) -> Case:
    """`rows_kernel` as `quantize` launches it."""
    types = ROWS if how.aim else {**ROWS, **REPORTED}
    return Case(rows_kernel, types, rows_constants(how, target_of(capability)))


def lanes(how: Coding, capability: int, *, along: int = 0, both: bool = False) -> Case:
    """`lanes_kernel` as `quantize` launches it."""
    types = LANES if how.aim else {**LANES, **REPORTED}
    return Case(lanes_kernel, types, lanes_constants(how, target_of(capability), along=along, both=both))


def quantizers(capability: int) -> dict[str, Case]:
    """Every kernel that is no GEMM, as a linear with the paper's recipe launches it, and the rarer ones."""
    transformed = replace(NVFP4, rht=16)
    measured = {"x_ptr": "*i16", "amax_ptr": "*i32"}
    words = dict.fromkeys(("rows_ptr", "cols_ptr"), "*i64") | {"words_ptr": "*i32"}
    keys = dict.fromkeys(("row_key", "other_row_key", "column_key", "R", "C"), "i32")
    return {
        "amax": Case(amax_kernel, {**measured, "n": "i32"}, {"BLOCK": 4096, "LOOPS": 4}),
        "amax, RHT": Case(
            transformed_amax_kernel,
            {**measured, **SIZES, "signs": "i32"},
            {"ALONG": 0, "RHT": 16, "LANES": 16, **lanes_tile(transformed)},
        ),
        "words": Case(words_kernel, {**words, **keys}, {"BLOCK": 256}),
        "rows": rows(NVFP4, capability),
        "rows, stochastic": rows(replace(NVFP4, noise_bits=8), capability),
        "rows, mxfp4": rows(MXFP4, capability),
        "rows, mxfp8": rows(MXFP8, capability),
        "columns, RHT": lanes(transformed, capability),
        "columns, RHT, stochastic": lanes(replace(transformed, noise_bits=8), capability),
        "columns, mxfp4, RHT 32, stochastic": lanes(replace(MXFP4, rht=32, noise_bits=8, centred=True), capability),
        "columns, mxfp8": lanes(MXFP8, capability),
        "weight 16x16, both": lanes(TILES, capability, both=True),
        "rows, four over six": lanes(replace(NVFP4, over=1), capability, along=1),
        "weight 16x16, four over six": lanes(replace(TILES, over=1), capability, both=True),
    }


def gemm(how: Coding, capability: int, output: dict[str, bool]) -> Case:
    """`gemm_kernel` as `multiply` launches it."""
    target = target_of(capability)
    tile = target.tile(how)
    types = POINTERS if output["ROUND"] else {**POINTERS, "out_ptr": "*fp32"}
    return Case(gemm_kernel, types, {**gemm_constants(how, how, target, tile), **output}, tile.options)


def persistent_gemm(capability: int, output: dict[str, bool]) -> Case:
    """`persistent_gemm_kernel` as `multiply` launches it."""
    tile = target_of(capability).gemm
    types = dict(PRODUCT)
    for operand, lines in (("a", tile.rows), ("b", tile.columns)):
        types[f"{operand}_codes"] = f"tensordesc<u8[{lines},{tile.depth // 2}]>"
        types[f"{operand}_scales"] = f"tensordesc<fp8e4nv[1,{lines // 128},{tile.depth // 64},2,256]>"
    if not output["ROUND"]:
        types["out_ptr"] = "*fp32"
    constants = {"DIVISOR": 2688.0**2, "PROGRAMS": 132, "STAGES": tile.stages, **tile.sizes, **output}
    return Case(persistent_gemm_kernel, types, constants, tile.options)


def gemms(capability: int) -> dict[str, Case]:
    """The products of a linear: Fprop (and Dgrad) to BF16, Wgrad into FP32."""
    cases = {
        "gemm": gemm(NVFP4, capability, TO_BF16),
        "gemm, Wgrad": gemm(NVFP4, capability, TO_MAIN_GRAD),
        "gemm, mxfp4": gemm(MXFP4, capability, TO_BF16),
    }
    if capability > 80:  # Triton has no E4M3 on Ampere
        cases["gemm, mxfp8"] = gemm(MXFP8, capability, TO_BF16)
    if target_of(capability).persistent:
        cases["gemm, TMA"] = persistent_gemm(capability, TO_BF16)
        cases["gemm, TMA, Wgrad"] = persistent_gemm(capability, TO_MAIN_GRAD)
    return cases
