"""From operands to Transformer Engine's quantizers.

A quantizer makes the row-wise copy (contracted along the columns) and the column-wise copy (contracted along the rows)
of a tensor in one call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_fp4.precision.operand import Format, FourOverSix, Operand, Rounding, Signs
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.te.api import Api

TENSORS = ("input", "weight", "grad_output")
"""What a linear quantizes, in the words of Transformer Engine's roles: x, w, dy."""


def directions(precision: LinearPrecision, tensor: str) -> tuple[Operand, Operand]:
    """(row-wise, column-wise) operands of one of `TENSORS`."""
    fprop, dgrad, wgrad = precision.gemms
    return {"input": (fprop.x, wgrad.x), "weight": (fprop.w, dgrad.w), "grad_output": (dgrad.dy, wgrad.dy)}[tensor]


def one_quantizer(row: Operand, column: Operand) -> bool:
    """Whether one quantizer makes both copies: equal but for the transform, which touches column-wise copies only."""
    return row.quantized and row == replace(column, rht_size=0, rht_signs=Signs.fixed)


def make_quantizer(api: Api, row: Operand | None, column: Operand | None) -> Any:
    """One TE quantizer for the row-wise and/or column-wise copy of a tensor; see `one_quantizer` for a pair."""
    operand = column or row  # the column-wise one has the Hadamard transform, if any
    assert operand is not None
    directions = {"rowwise": row is not None, "columnwise": column is not None}
    if operand.format is Format.mxfp8:
        return api.symbols["MXFP8Quantizer"](api.e4m3, **directions)
    if operand.format is Format.fp8_block:
        dims = 2 if operand.tile == (128, 128) else 1
        return api.symbols["Float8BlockQuantizer"](
            api.e4m3, **directions, amax_epsilon=0.0, force_pow_2_scales=True, block_scaling_dim=dims
        )
    assert operand.format is Format.nvfp4
    settings: dict[str, Any] = {
        "with_rht": operand.rht_size == 16,
        "with_post_rht_amax": operand.rht_size == 16,  # trap 8: of x for the row-wise copy, of H(x) for the other
        "with_2d_quantization": operand.tile == (16, 16),
        "stochastic_rounding": operand.rounding is Rounding.sr,
        "with_random_sign_mask": operand.rht_signs is not Signs.none,
    }
    if operand.four_over_six is not FourOverSix.off:
        settings["nvfp4_use_4over6"] = True
        settings["nvfp4_e4m3_max"] = operand.four_over_six_bound
        settings["nvfp4_4over6_err_mode"] = operand.four_over_six.name.upper()
    return api.symbols["NVFP4Quantizer"](**directions, **settings)
