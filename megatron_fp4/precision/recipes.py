"""The recipes that have a name, as values: the paper's, and those it is compared with.

configs/precision/recipe/ holds the same values for command lines, and the paper's ablations as changes to them
(tests/precision/test_recipes.py holds both equal).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_fp4.precision.operand import Format, Operand, Rounding, Signs
from megatron_fp4.precision.spec import Dgrad, Fprop, LinearPrecision, Wgrad


def uniform(operand: Operand) -> LinearPrecision:
    """All six operands alike."""
    return LinearPrecision(Fprop(operand, operand), Dgrad(operand, operand), Wgrad(operand, operand))


def nvfp4_paper(*, rht: bool = True, stochastic: bool = True, square_weights: bool = True) -> LinearPrecision:
    """The paper's recipe (section 4): 16x16 weights; stochastic gradients; Hadamard transform in Wgrad only."""
    rht_size = 16 if rht else 0
    x = Operand(Format.nvfp4)
    w = Operand(Format.nvfp4, tile=(16, 16) if square_weights else (1, 16))
    dy = Operand(Format.nvfp4, rounding=Rounding.sr if stochastic else Rounding.rne)
    return LinearPrecision(
        Fprop(x=x, w=w), Dgrad(dy=dy, w=w), Wgrad(dy=replace(dy, rht_size=rht_size), x=replace(x, rht_size=rht_size))
    )


def nvfp4_forward() -> LinearPrecision:
    """What a model will be served in, W4A4, and a backward pass in high precision: to finish one that was BF16."""
    operand = Operand(Format.nvfp4)
    return LinearPrecision(Fprop(x=operand, w=operand))


def nvfp4_ms_eden(*, square_weights: bool = True) -> LinearPrecision:
    """The paper's forward pass, and MS-EDEN in the backward pass (arXiv 2601.22813).

    Both operands of Dgrad and Wgrad are rounded to nearest behind a random Hadamard transform of 128, with scales that
    undo the bias. Without square weights it is Quartet II's recipe, but that the backward pass quantizes the tensors
    themselves.
    """
    eden = Operand(Format.nvfp4, rounding=Rounding.ms_eden, rht_size=128, rht_signs=Signs.per_index)
    forward = nvfp4_paper(square_weights=square_weights).fprop
    return LinearPrecision(forward, Dgrad(eden, eden), Wgrad(eden, eden))


def mxfp4_paper() -> LinearPrecision:
    """MXFP4 as the paper compares it (figure 6): stochastic gradients, Hadamard transform of length 32 in Wgrad."""
    x = w = Operand(Format.mxfp4)
    dy = Operand(Format.mxfp4, rounding=Rounding.sr)
    return LinearPrecision(
        Fprop(x=x, w=w), Dgrad(dy=dy, w=w), Wgrad(dy=replace(dy, rht_size=32), x=replace(x, rht_size=32))
    )


def fp8_paper() -> LinearPrecision:
    """The paper's FP8 baseline (appendix A.1): E4M3 in 128x128 blocks for weights, 1x128 for the other tensors."""
    x = dy = Operand(Format.fp8_block)
    w = Operand(Format.fp8_block, tile=(128, 128))
    return LinearPrecision(Fprop(x=x, w=w), Dgrad(dy=dy, w=w), Wgrad(dy=dy, x=x))


def mxfp8() -> LinearPrecision:
    """E4M3 with a power-of-two scale per 32, for every operand (as in arXiv 2512.20856)."""
    return uniform(Operand(Format.mxfp8))


RECIPES = {"nvfp4": nvfp4_paper(), "mxfp4": mxfp4_paper(), "mxfp8": mxfp8(), "fp8": fp8_paper()}
"""By the name that they have in configs/precision/recipe."""
