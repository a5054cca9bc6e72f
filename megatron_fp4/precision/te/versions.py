"""What each version of Transformer Engine can do, and what of a recipe it cannot.

One idea: a recipe that Transformer Engine would compute differently, or not at all, is refused before anything runs,
with its version and the remedy. What can be seen in a signature is detected there; the rest is keyed by version. This
file never imports Transformer Engine (backends/transformer_engine.py does), so it can be checked against the sources of
any version.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fp4.precision.backends import copies_of
from megatron_fp4.precision.config import GEMMS
from megatron_fp4.precision.operand import AmaxScope, Format, FourOverSix, Operand, Rounding, ScaleOrder, Signs
from megatron_fp4.precision.spec import Gemm, LinearPrecision

MINIMUM = (2, 9)
FULL = (2, 19)

PACKAGE = "transformer_engine"
SYMBOLS = {
    "NVFP4Quantizer": "pytorch.tensor.nvfp4_tensor",
    "MXFP8Quantizer": "pytorch.tensor.mxfp8_tensor",
    "Float8BlockQuantizer": "pytorch.tensor.float8_blockwise_tensor",
    "general_gemm": "pytorch.cpp_extensions.gemm",
    "NVFP4BlockScaling": "common.recipe",
    "CustomRecipe": "common.recipe",
}
"""Every symbol that is needed, and its module below `transformer_engine`."""
OPTIONAL_SYMBOLS = {
    "QuantizerRole": "pytorch.quantization",
    "IdentityQuantizer": "pytorch.tensor.identity_tensor",
    "HybridQuantizer": "pytorch.tensor.hybrid_tensor",
    "get_workspace": "pytorch.module.base",
    "NVFP4QuantizerRef": "pytorch.custom_recipes.reference_nvfp4",
    "Fp4Formats": "pytorch.custom_recipes.reference_utils",
}
FAST_MATH = ("NVTE_USE_FAST_MATH", "NVTE_NVFP4_4OVER6_ERR_USE_FAST_MATH")
"""Environment variables that its NVFP4 kernels read at each call, and then round differently (trap 4)."""


@dataclass(frozen=True)
class Features:
    """What one version of Transformer Engine does.

    scale_order: of its block scales. gemm_workspace: `general_gemm` wants a workspace tensor. four_over_six:
    `NVFP4Quantizer` has it. role_objects: a custom recipe's factory gets `QuantizerRole` objects (before: strings).
    mixed_directions: `te.Linear` can quantize the two directions of a tensor differently (Hybrid, Identity quantizers).
    """

    scale_order: ScaleOrder
    gemm_workspace: bool
    four_over_six: bool
    role_objects: bool
    mixed_directions: bool


TABLE = {
    "2.9": Features(
        ScaleOrder.paper, gemm_workspace=True, four_over_six=False, role_objects=False, mixed_directions=False
    ),
    "2.14": Features(
        ScaleOrder.te, gemm_workspace=False, four_over_six=False, role_objects=False, mixed_directions=False
    ),
    "2.16": Features(
        ScaleOrder.te, gemm_workspace=False, four_over_six=False, role_objects=True, mixed_directions=False
    ),
    "2.19": Features(ScaleOrder.te, gemm_workspace=False, four_over_six=True, role_objects=True, mixed_directions=True),
    "2.20": Features(ScaleOrder.te, gemm_workspace=False, four_over_six=True, role_objects=True, mixed_directions=True),
}
"""The versions whose sources the contract tests read. Others are detected in the same way."""


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor). Raises ValueError for a version below the minimum."""
    match = re.match(r"(\d+)\.(\d+)", text)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    if version < MINIMUM:
        raise ValueError(
            f"Transformer Engine {text} is older than {_dotted(MINIMUM)}, the first version with the interface used"
            f" here; install transformer-engine[pytorch]>={_dotted(FULL)}, or use precision.backend=emulated"
        )
    return version


def detect(version: str, parameters: Mapping[str, Collection[str]]) -> Features:
    """parameters: names of the parameters of each symbol (constructor or function) that exists in this version.

    Raises ValueError if a symbol that is needed is missing.
    """
    number = parse_version(version)
    missing = sorted(set(SYMBOLS) - set(parameters))
    if missing:
        raise ValueError(
            f"Transformer Engine {version} has no {', '.join(missing)}, which precision.backend=transformer_engine"
            f" needs; use {_dotted(FULL)} to 2.20, or precision.backend=emulated"
        )
    return Features(
        scale_order=ScaleOrder.te
        if number >= (2, 14)
        else ScaleOrder.paper,  # inside the kernel: no signature shows it
        gemm_workspace="workspace" in parameters["general_gemm"],
        four_over_six="nvfp4_use_4over6" in parameters["NVFP4Quantizer"],
        role_objects="QuantizerRole" in parameters,
        mixed_directions={"HybridQuantizer", "IdentityQuantizer"} <= set(parameters),
    )


TENSORS = ("input", "weight", "grad_output")
"""What a linear quantizes, in the words of Transformer Engine's roles: x, w, dy."""


def directions(precision: LinearPrecision, tensor: str) -> tuple[Operand, Operand]:
    """(row-wise, column-wise) operands of one of `TENSORS`."""
    fprop, dgrad, wgrad = precision.fprop, precision.dgrad, precision.wgrad
    return {"input": (fprop.x, wgrad.x), "weight": (fprop.w, dgrad.w), "grad_output": (dgrad.dy, wgrad.dy)}[tensor]


def one_quantizer(row: Operand, column: Operand) -> bool:
    """Whether one quantizer makes both copies: equal but for the transform, which touches column-wise copies only."""
    return row.quantized and row.rht_size == 0 and _without_transform(row) == _without_transform(column)


def _without_transform(operand: Operand) -> dict[str, Any]:
    return {name: value for name, value in vars(operand).items() if name not in ("rht_size", "rht_signs")}


def check_recipe(name: str, precision: LinearPrecision, version: str, features: Features) -> None:
    """Raises ValueError if this version cannot compute the recipe exactly as it says."""
    for tensor in TENSORS:
        row, column = directions(precision, tensor)
        square = column.four_over_six is not FourOverSix.off and column.tile == (16, 16)
        if square and not one_quantizer(row, column):
            reason = (
                "its column-wise copy alone has four_over_six in 16x16 tiles, which its kernel makes only together with"
                " an equal row-wise copy; give both GEMMs that share this tensor the same operand"
            )
            raise _refusal(name, tensor, reason, version)
    for gemm_name in GEMMS:
        gemm: Gemm = getattr(precision, gemm_name)
        for reason in _gemm_objections(gemm_name, gemm):
            raise _refusal(name, gemm_name, reason, version)
        for operand in gemm.operands:
            for reason in _operand_objections(operand, features):
                raise _refusal(name, gemm_name, reason, version)


def _refusal(name: str, gemm_name: str, reason: str, version: str) -> ValueError:
    return ValueError(
        f"precision recipe {name}, {gemm_name}: {reason}. (precision.backend=transformer_engine, version {version};"
        f" precision.backend=emulated computes every recipe)"
    )


def _gemm_objections(gemm_name: str, gemm: Gemm) -> Iterator[str]:
    first, second = gemm.operands
    if first.format is not second.format:
        yield (
            f"operands in {first.format.name} and {second.format.name}, but its GEMMs take two operands of one format;"
            f" give both the same"
        )
    if first.tile == second.tile == (128, 128):
        yield "two operands in 128x128 tiles, which its FP8 GEMM does not take; use 1x128 tiles for activations"
    if first.rht_size and gemm_name != "wgrad":  # trap 8
        yield "a Hadamard transform, which it applies in wgrad only (to column-wise copies); use rht_size: 0"


def _operand_objections(operand: Operand, features: Features) -> Iterator[str]:
    if operand.format is Format.mxfp4:
        yield "mxfp4 has no quantizer there; use nvfp4 or mxfp8"
    if operand.rounding is Rounding.sr_headroom:
        yield "rounding sr_headroom does not exist there; use sr"
    if operand.noise_bits != 8:
        yield f"noise_bits = {operand.noise_bits}, but it draws 8 bits per element; use 8"
    if operand.rht_size not in (0, 16):
        yield f"rht_size = {operand.rht_size}, but its Hadamard transform has 16 elements; use 16 or 0"
    if operand.rht_size and operand.rht_signs is Signs.per_step:
        yield "rht_signs per_step, but its signs are one fixed vector; use fixed or none"
    if operand.rht_size and operand.tile == (16, 16):
        yield "a Hadamard transform of an operand in 16x16 tiles; use 1x16 tiles"
    if operand.amax_scope is AmaxScope.row:
        yield "amax_scope row, which is not connected to its row-scaled mode; use shard or tensor"
    yield from _four_over_six_objections(operand, features)
    ordered = operand.format is Format.nvfp4 and operand.four_over_six is FourOverSix.off
    if ordered and operand.scale_order is not features.scale_order:
        yield (
            f"scale_order {operand.scale_order.name}, but this version multiplies in the order"
            f" {features.scale_order.name} (it changed in 2.14); set scale_order: {features.scale_order.name}"
        )


def _four_over_six_objections(operand: Operand, features: Features) -> Iterator[str]:
    if operand.four_over_six is FourOverSix.off:
        return
    if not features.four_over_six:
        yield "four_over_six, which came in 2.17; install a newer version, or set four_over_six: off"
    if operand.rht_size or operand.stochastic:
        yield "four_over_six with a Hadamard transform or stochastic rounding, which it refuses; turn one of them off"


def check_te_shape(name: str, operand: Operand, shape: Sequence[int], along: int) -> None:
    """Raises ValueError for a local shape `[R, C]` that its kernels refuse although the tiles fit (trap 9).

    Both dimensions must be multiples of 16 (32 for mxfp8), and the contracted one of 32.
    """
    if not operand.quantized:
        return
    unit = 32 if operand.format is Format.mxfp8 else 16
    for dim, size in enumerate(shape):
        multiple = 32 if dim == along else unit
        if size % multiple:
            what = "the contracted dimension" if dim == along else "the other dimension"
            raise ValueError(
                f"{name}: local shape {tuple(shape)} in {operand.format.name}: {what}, {size}, must be a multiple of"
                f" {multiple} for Transformer Engine's kernels (128 is recommended); change the size or the parallel"
                f" layout, or leave this linear in bf16"
            )


def check_te_linear(name: str, precision: LinearPrecision, shape: tuple[int, int], tokens: int) -> None:
    """Raises ValueError if an operand of a linear with the local weight `[N, K]` has a shape that kernels refuse."""
    N, K = shape
    shapes = {"x": (tokens, K), "w": (N, K), "dy": (tokens, N)}
    for operand, copies in copies_of(precision).items():
        for copy in copies:
            check_te_shape(f"{name}: operand {operand} of {copy.gemm}", copy.operand, shapes[operand], copy.along)


def check_capability(capability: tuple[int, int], formats: Collection[Format]) -> None:
    """Raises ValueError where the kernels of a format do not work on this GPU.

    Trap 3: `is_nvfp4_available()` says yes to everything from 10.0 on, but on 12.x kernels fail or give zero gradients.
    """
    wanted = {Format.nvfp4: (10, 10), Format.mxfp8: (10, 10), Format.fp8_block: (9, 10)}
    for fmt in sorted(formats, key=lambda f: f.name):
        low, high = wanted.get(fmt, (0, 99))
        if not low <= capability[0] <= high:
            raise ValueError(
                f"{fmt.name} with Transformer Engine needs a GPU of compute capability {low}.x"
                f"{'' if low == high else f' to {high}.x'}, this one has {capability[0]}.{capability[1]}; use"
                f" precision.backend=emulated"
            )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
