"""Recipes by name: which of the values in `spec` the paper and its comparisons use."""

from __future__ import annotations

from dataclasses import replace

from megatron_fp4.precision.operand import Format, Operand, Rounding
from megatron_fp4.precision.spec import Dgrad, Fprop, LinearPrecision, Wgrad


def uniform(operand: Operand) -> LinearPrecision:
    """All six operands alike."""
    return LinearPrecision(Fprop(operand, operand), Dgrad(operand, operand), Wgrad(operand, operand))


def nvfp4_paper(*, rht: bool = True, stochastic: bool = True, square_weights: bool = True) -> LinearPrecision:
    """The paper's recipe (section 4): 16x16 weights; stochastic gradients; Hadamard transform in Wgrad only."""
    rht_size = 16 if rht else 0
    gradient = Rounding.sr if stochastic else Rounding.rne
    x = Operand(Format.nvfp4)
    w = Operand(Format.nvfp4, tile=(16, 16) if square_weights else (1, 16))
    dy = Operand(Format.nvfp4, rounding=gradient)
    return LinearPrecision(
        fprop=Fprop(x=x, w=w),
        dgrad=Dgrad(dy=dy, w=w),
        wgrad=Wgrad(dy=replace(dy, rht_size=rht_size), x=replace(x, rht_size=rht_size)),
    )
