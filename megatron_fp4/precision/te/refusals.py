"""What of a recipe, a shape or a GPU Transformer Engine would compute differently, or not at all.

Refused before anything runs, with the version and the remedy. The traps are those of docs/transformer_engine.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from megatron_fp4.precision.backends.protocol import copies_of
from megatron_fp4.precision.operand import AmaxRounding, AmaxScope, Format, FourOverSix, Operand, Rounding, Signs
from megatron_fp4.precision.spec import Gemm, LinearPrecision
from megatron_fp4.precision.te.quantizers import TENSORS, directions, one_quantizer
from megatron_fp4.precision.te.versions import Features


def check_recipe(name: str, precision: LinearPrecision, version: str, features: Features) -> None:
    """Raises ValueError if this version cannot compute the recipe exactly as it says."""
    for place, reason in _objections(precision, features):
        raise ValueError(
            f"precision recipe {name}, {place}: {reason}. (precision.backend=transformer_engine, version {version};"
            f" precision.backend=emulated computes every recipe)"
        )


def _objections(precision: LinearPrecision, features: Features) -> Iterator[tuple[str, str]]:
    """(where, why)."""
    for tensor in TENSORS:
        row, column = directions(precision, tensor)
        square = column.four_over_six is not FourOverSix.off and column.tile == (16, 16)
        if square and not one_quantizer(row, column):
            yield (
                tensor,
                "its column-wise copy alone has four_over_six in 16x16 tiles, which its kernel makes only together with"
                " an equal row-wise copy; give both GEMMs that share this tensor the same operand",
            )
    for gemm in precision.gemms:
        for reason in _gemm_objections(gemm):
            yield gemm.name, reason
        for operand in gemm.operands:
            for reason in _operand_objections(operand, features):
                yield gemm.name, reason


def _gemm_objections(gemm: Gemm) -> Iterator[str]:
    first, second = gemm.operands
    if first.format is not second.format:
        yield (
            f"operands in {first.format.name} and {second.format.name}, but its GEMMs take two operands of one format;"
            f" give both the same"
        )
    if first.tile == second.tile == (128, 128):
        yield "two operands in 128x128 tiles, which its FP8 GEMM does not take; use 1x128 tiles for activations"
    if first.rht_size and gemm.name != "wgrad":  # trap 8
        yield "a Hadamard transform, which it applies in wgrad only (to column-wise copies); use rht_size: 0"


def _operand_objections(operand: Operand, features: Features) -> Iterator[str]:
    if operand.format is Format.mxfp4:
        yield "mxfp4 has no quantizer there; use nvfp4 or mxfp8"
    if operand.rounding is Rounding.sr_headroom:
        yield "rounding sr_headroom does not exist there; use sr"
    if operand.eden:
        yield "rounding ms_eden, which its kernels do not make; use sr"
    if operand.noise_bits != 8:
        yield f"noise_bits = {operand.noise_bits}, but it draws 8 bits per element; use 8"
    if operand.rht_size not in (0, 16):
        yield f"rht_size = {operand.rht_size}, but its Hadamard transform has 16 elements; use 16 or 0"
    if operand.rht_size and operand.rht_signs in (Signs.per_step, Signs.per_index):
        yield f"rht_signs {operand.rht_signs.name}, but its signs are one fixed vector; use fixed or none"
    if operand.rht_size and operand.tile == (16, 16):
        yield "a Hadamard transform of an operand in 16x16 tiles; use 1x16 tiles"
    if operand.amax_scope is AmaxScope.row:
        yield "amax_scope row, which is not connected to its row-scaled mode; use shard or tensor"
    if operand.amax_scope is AmaxScope.group128:
        yield "amax_scope group128, but its GEMM applies one FP32 scale to an operand; use shard or tensor"
    if operand.center:
        yield "center, which its modules have no place for; leave it out"
    if operand.amax_scope is AmaxScope.static:
        yield "amax_scope static, but its quantizers measure every tensor; use tensor"
    if operand.amax_rounding is not AmaxRounding.none:
        yield f"amax_rounding {operand.amax_rounding.name}, but its quantizers take the amax as measured; use none"
    if operand.four_over_six is not FourOverSix.off:
        if not features.four_over_six:
            yield "four_over_six, which came in 2.17; install a newer version, or set four_over_six: off"
        if operand.rht_size or operand.stochastic:
            yield "four_over_six with a Hadamard transform or stochastic rounding, which it refuses; turn one off"
    elif operand.format is Format.nvfp4 and operand.scale_order is not features.scale_order:
        yield (
            f"scale_order {operand.scale_order.name}, but this version multiplies in the order"
            f" {features.scale_order.name} (it changed in 2.14); set scale_order: {features.scale_order.name}"
        )


LEAST_ROWS = 128
"""Multiple of rows to which segments of experts are extended, which its kernels then take along any dimension."""


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
