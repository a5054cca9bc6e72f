"""Floor 2: what a GEMM is. Values that describe precision, the linear op, and the backends that carry it out."""

from megatron_fp4.precision.backends import Backend, NonFiniteError
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.linear_op import LinearSite, WeightCache, WgradQueue, quantized_linear
from megatron_fp4.precision.spec import (
    AmaxScope,
    Format,
    FourOverSix,
    Gemm,
    LinearPrecision,
    Operand,
    Rounding,
    ScaleOrder,
    Signs,
    WgradOutput,
    nvfp4_paper,
)
from megatron_fp4.precision.te.recipe import te_recipe

__all__ = [
    "AmaxScope",
    "Backend",
    "EmulatedBackend",
    "Format",
    "FourOverSix",
    "Gemm",
    "LinearPrecision",
    "LinearSite",
    "NonFiniteError",
    "Operand",
    "Rounding",
    "ScaleOrder",
    "Signs",
    "StepClock",
    "WeightCache",
    "WgradOutput",
    "WgradQueue",
    "nvfp4_paper",
    "quantized_linear",
    "te_recipe",
]
