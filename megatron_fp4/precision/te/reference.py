"""Transformer Engine's pure-Python NVFP4 quantizer in the place of its kernels.

Transformer Engine ships a reference of its NVFP4 quantization and GEMM for tests. It takes the same settings as the
quantizer of the kernels, so `te_recipe(plan, reference=True)` runs a plan through its real modules on any device, and
what they compute can be compared with the emulation bit for bit. It rounds to nearest only, and is far too slow to
train.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_fp4.precision.operand import Format
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.te.api import Api
from megatron_fp4.precision.te.quantizers import TENSORS, directions, one_quantizer


def reference_objections(precision: LinearPrecision) -> Iterator[str]:
    """What the reference cannot compute."""
    for gemm in precision.gemms:
        for operand in gemm.operands:
            if operand.format not in (Format.nvfp4, Format.bf16):
                yield f"{gemm.name} in {operand.format.name}, but the reference quantizer covers nvfp4 only"
            if operand.stochastic:
                rounding = operand.rounding.name
                yield f"{gemm.name} with rounding {rounding}, but the reference quantizer rounds to nearest; use rne"
    for tensor in TENSORS:
        row, column = directions(precision, tensor)
        if (row.quantized or column.quantized) and not one_quantizer(row, column):
            yield (
                f"its {tensor} is quantized differently for two GEMMs, but the reference quantizer cannot be half of a"
                f" HybridQuantizer (it lacks methods of a TE quantizer); give both the same operand"
            )


def with_reference(api: Api) -> Api:
    """The same interface (2.19 or newer) with the reference for `NVFP4Quantizer`."""
    reference, formats = api.symbols["NVFP4QuantizerRef"], api.symbols["Fp4Formats"]

    def nvfp4(
        *, with_2d_quantization: bool, stochastic_rounding: bool, with_post_rht_amax: bool, **settings: Any
    ) -> Any:
        assert not stochastic_rounding, "see reference_objections"
        assert with_post_rht_amax == settings["with_rht"], "the reference knows no other way"
        return reference(formats.E2M1, quant_tile_shape=(16, 16) if with_2d_quantization else (1, 16), **settings)

    return replace(api, symbols={**api.symbols, "NVFP4Quantizer": nvfp4})
