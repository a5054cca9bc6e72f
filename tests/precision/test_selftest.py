"""The self-test passes on what is right, and catches each bug that is planted in a backend."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.precision import EmulatedBackend, nvfp4_paper
from megatron_fp4.precision.backends import Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.recipes import RECIPES
from megatron_fp4.precision.selftest import trial
from megatron_fp4.precision.selftest.trial import golden_objections, self_test

CPU, PAPER = torch.device("cpu"), nvfp4_paper()
Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SIZES", {"T": 64, "N": 32, "K": 96})


class Planting:
    """Before a backend, among the bases of a class: a fault in the operands of one tensor, or in products."""

    def __init__(
        self, *settings: Any, tensor: str = "", change: Change = lambda tensors: tensors, product: Any = None
    ) -> None:
        super().__init__(*settings)
        self._tensor, self._change, self._product = tensor, change, product

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        operands = super().quantize(x, origin, copies)
        if origin.operand != self._tensor:
            return operands
        return tuple(one.with_tensors(self._change([part.clone() for part in one.tensors])) for one in operands)

    def matmul(self, a: QuantizedOperand, b: QuantizedOperand, **settings: Any) -> Tensor:
        product = super().matmul(a, b, **settings)
        return self._product(product, settings) if self._product else product


class Planted(Planting, ReferenceBackend):
    """The reference with a fault."""

    def __init__(self, tensor: str = "", change: Change = lambda tensors: tensors, product: Any = None) -> None:
        super().__init__(tensor=tensor, change=change, product=product)


def flipped_code(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    tensors[0][3, 2] ^= 0x10  # the odd element of the byte: column 5
    return tensors


def flipped_sign_of_zero(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    zeros = (tensors[0] == 0).nonzero()
    if len(zeros):
        tensors[0][tuple(zeros[0])] = 0x08
    return tensors


def scale_off_by_one(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    bits = tensors[1].view(torch.uint8)
    bits[1, 1] += 1
    return tensors


def amax_off_by_one(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    tensors[2].view(torch.int32).add_(1)
    return tensors


def zero_wgrad(product: Tensor, settings: dict[str, Any]) -> Tensor:
    return product.zero_() if settings.get("accumulate_into") is not None else product


def off_in_one_place(product: Tensor, settings: dict[str, Any]) -> Tensor:
    product[-1, -1] += 0.01 * product.abs().max()
    return product


def forgets_main_grad(product: Tensor, settings: dict[str, Any]) -> Tensor:
    into = settings.get("accumulate_into")
    return product if into is None else product - product.mean()


@pytest.mark.parametrize("backend", [EmulatedBackend(), ReferenceBackend()], ids=["emulated", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_right_passes(backend: EmulatedBackend | ReferenceBackend, dtype: torch.dtype) -> None:
    assert self_test(backend, RECIPES.values(), CPU, dtype) == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Planted("x", flipped_code), r"fprop.x: codes\[3, 5\]: planted has .* \(1 of 6144 codes differ\)"),
        (Planted("dy", flipped_code), r"dgrad.dy: codes\[3, 5\]"),
        (Planted("x", flipped_sign_of_zero), r"fprop.x: codes"),
        (Planted("w", scale_off_by_one), r"fprop.w: scales\[1, 1\]: planted has"),
        (Planted("w", amax_off_by_one), r"fprop.w: amax: planted has"),
        (Planted(product=zero_wgrad), r"wgrad \(gradient of the weight\) is all zero"),
        (Planted(product=off_in_one_place), r"dgrad: largest error .*, limit"),
        (Planted(product=forgets_main_grad), r"wgrad: largest error .*added to main_grad"),
    ],
    ids=["code", "stochastic code", "-0", "scale", "amax", "zero gradient", "product", "main_grad"],
)
def test_each_planted_bug_is_caught(fault: Planted, message: str) -> None:
    lines = self_test(fault, [PAPER], CPU, torch.bfloat16)
    assert any(re.search(message, line) for line in lines), lines


def test_values_without_codes_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation keeps no codes: one value that is another one is seen."""
    right = EmulatedBackend._values

    def wrong(self: Any, *arguments: Any) -> Tensor:
        values = right(self, *arguments).clone()
        values[2, 7] *= -1
        return values

    monkeypatch.setattr(EmulatedBackend, "_values", wrong)
    lines = self_test(EmulatedBackend(), [PAPER], CPU, torch.bfloat16)
    assert any("fprop.x: values[2, 7]: emulated has" in line for line in lines), lines


def test_the_reference_is_what_was_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of all operands, on every machine and with every torch; a reference that rounds otherwise is seen."""
    monkeypatch.undo()
    assert golden_objections() == []
    monkeypatch.setitem(trial.RECIPES, "nvfp4", nvfp4_paper(stochastic=False))
    (line,) = golden_objections()
    assert line.startswith("recipe nvfp4: the reference's operands are ")


def test_padded_and_mixed_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes grow to what a precision needs; GEMMs of two formats and rows of their own scale pass."""
    long = PAPER.with_operands(lambda o: replace(o, rht_size=128) if o.rht_size else o)
    assert trial.case_of(long).tokens == 128
    padded = replace(PAPER, wgrad=replace(PAPER.wgrad, pad=True))
    assert self_test(EmulatedBackend(), [long, padded], CPU, torch.bfloat16) == []
