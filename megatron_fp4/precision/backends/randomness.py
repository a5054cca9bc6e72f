"""What is random in an operand, and the address that it is drawn at: the same in every layout and in recomputation."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from megatron_fp4.numerics.hadamard import fixed_signs, signs_from_key
from megatron_fp4.numerics.random import key_of, random_bits
from megatron_fp4.precision.backends.protocol import Copy, OperandOrigin
from megatron_fp4.precision.operand import Operand, Signs

EXPERT_STRIDE = 1 << 40
"""Rows of one expert's addresses: more than tokens in a global batch, or rows in a weight."""


def expert_rows(rows: Tensor, experts: Tensor | int) -> Tensor:
    """Noise addresses of rows that belong to experts: a token that reaches k experts has k rows of one address.

    rows: int64 global indices. experts: global number of the expert of each row, or of all. One key then serves all
    experts of a linear, so one pass draws the noise of all.
    """
    return rows + experts * EXPERT_STRIDE


def noise_key(origin: OperandOrigin, copy: Copy) -> int:
    """Key of the rounding noise of one copy."""
    return key_of(origin.seed, origin.step, origin.name, f"{copy.gemm}.{origin.operand}")


def block_addresses(origin: OperandOrigin, copy: Copy) -> tuple[Tensor, Tensor]:
    """Rows and columns of the first element of each block of 16 along the contraction."""
    return (origin.rows, origin.cols[::16]) if copy.along == 1 else (origin.rows[::16], origin.cols)


def with_signs(x: Tensor, origin: OperandOrigin, copy: Copy) -> Tensor:
    """`x [R, C]` times the sign of each index along the contraction (`Signs.per_index`); else x itself.

    The sign is drawn at the index in the logical tensor, a token's address or a feature, so both operands of a GEMM and
    every layout have the same, and other tokens, so other microbatches, have others. (An expert's weight has its number
    in the addresses of its rows, which are features: it is left out.)
    """
    if copy.operand.rht_signs is not Signs.per_index:
        return x
    index = (origin.cols if copy.along == 1 else origin.rows) % EXPERT_STRIDE
    key = key_of(origin.seed, origin.step, origin.name, copy.gemm, "signs")
    bits = random_bits(key, torch.zeros_like(index[:1]), index)[0] & 1
    signs = 1.0 - 2.0 * bits.to(torch.float32)
    return x * (signs if copy.along == 1 else signs[:, None]).to(x.dtype)


def signs_for(origin: OperandOrigin, operand: Operand, device: torch.device) -> Tensor | None:
    """Signs of the Hadamard transform, FP32 `[rht_size]`; both operands of a GEMM get the same."""
    if operand.rht_size == 0 or operand.rht_signs in (Signs.none, Signs.per_index):  # those: see `with_signs`
        return None
    if operand.rht_signs is Signs.fixed:
        return fixed_signs(operand.rht_size, device)
    return signs_from_key(key_of(origin.seed, origin.step, origin.name, "rht"), operand.rht_size, device)


class SignVectors:
    """`signs_for`, each vector made once: the fixed ones for good, those of a step until the next step."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Tensor | None] = {}
        self._step = (-1, -1)

    def of(self, origin: OperandOrigin, operand: Operand, device: torch.device) -> Tensor | None:
        """See `signs_for`."""
        key: tuple[Hashable, ...] = (operand.rht_size, operand.rht_signs, device)
        if operand.rht_signs is Signs.per_step:
            if self._step != (origin.seed, origin.step):
                self._step = (origin.seed, origin.step)
                self._kept = {}
            key = (*key, origin.name)
        if key not in self._kept:
            self._kept[key] = signs_for(origin, operand, device)
        return self._kept[key]
