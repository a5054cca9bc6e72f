"""Floor 3: what a GEMM is. Values that describe precision, the linear op, and the backends that carry it out."""

from megatron_fp4.precision.backends import Backend, NonFiniteError
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.linear_op import quantized_linear
from megatron_fp4.precision.operand import AmaxScope, Format, FourOverSix, Operand, Rounding, ScaleOrder, Signs
from megatron_fp4.precision.recipes import nvfp4_paper, uniform
from megatron_fp4.precision.sharding import Sharding
from megatron_fp4.precision.spec import Dgrad, Fprop, Gemm, LinearPrecision, Wgrad, WgradOutput
from megatron_fp4.precision.te.recipe import te_recipe
from megatron_fp4.precision.weight_cache import WeightCache
from megatron_fp4.precision.wgrad import WgradPlan, WgradQueue

__all__ = [
    "AmaxScope",
    "Backend",
    "Dgrad",
    "EmulatedBackend",
    "Format",
    "FourOverSix",
    "Fprop",
    "Gemm",
    "LinearPrecision",
    "NonFiniteError",
    "Operand",
    "Rounding",
    "ScaleOrder",
    "Sharding",
    "Signs",
    "StepClock",
    "WeightCache",
    "Wgrad",
    "WgradOutput",
    "WgradPlan",
    "WgradQueue",
    "nvfp4_paper",
    "quantized_linear",
    "te_recipe",
    "uniform",
]
