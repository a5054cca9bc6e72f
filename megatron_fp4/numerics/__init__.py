"""Floor 0: functions of arrays. Number formats, rounding, block scales, transforms, addressed randomness."""

from megatron_fp4.numerics.block_scale import QuantizedTensor, quantize_nvfp4, quantize_power_of_two
from megatron_fp4.numerics.hadamard import fixed_signs, random_hadamard
from megatron_fp4.numerics.random import key_of, normal, random_bits, uniform

__all__ = [
    "QuantizedTensor",
    "fixed_signs",
    "key_of",
    "normal",
    "quantize_nvfp4",
    "quantize_power_of_two",
    "random_bits",
    "random_hadamard",
    "uniform",
]
