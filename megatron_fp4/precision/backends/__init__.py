"""How a GEMM is carried out: the backends, and the protocol between them and the linear op.

reference            readable formulas, codes and scales really made; the oracle
emulated             the same operands, vectorized or compiled, multiplied by a BF16 GEMM
native_fp8           the same operands again, multiplied by a Hopper GPU's FP8 tensor cores
transformer_engine   FP4 tensor cores
padded               wraps one of these where the tiles do not divide the shapes
centred              wraps one of these where a recipe takes the mean off activations
"""

from megatron_fp4.precision.backends.finite import NonFiniteError, NonFiniteEvent, NonFiniteWatch
from megatron_fp4.precision.backends.protocol import Backend, Copy, OperandOrigin, QuantizedOperand, copies_of

__all__ = [
    "Backend",
    "Copy",
    "NonFiniteError",
    "NonFiniteEvent",
    "NonFiniteWatch",
    "OperandOrigin",
    "QuantizedOperand",
    "copies_of",
]
