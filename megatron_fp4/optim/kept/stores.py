"""One state tensor of a rank's part of a bucket: what is kept of it, and FP32 values of any stretch.

Stretches that are written begin at multiples of 64 elements and end at one or at the end of a parameter, after which
there are unused elements up to the next (layout.py). Where `in_place`, what is read is what is kept: to change it is to
write it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron_fp4.numerics.compiled import StageRunner
from megatron_fp4.optim.kept import remainder
from megatron_fp4.optim.kept.codes import Codes, Fp8, Int8, RootInt8, UnsignedFp8, to_bf16
from megatron_fp4.optim.kept.config import BLOCK, MomentFormat

RUNNERS = {compile: StageRunner(compile) for compile in (False, True)}
"""Of the conversions of moments; one of each, so that all stores share its kernels."""


class Store(Protocol):
    """tensors: what is kept. in_place: values that are read are views of it. needs_words: `write` rounds with noise."""

    in_place: bool
    needs_words: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def read(self, start: int, stop: int) -> Tensor:
        """FP32 values of elements `[start, stop)`."""

    def write(self, start: int, stop: int, values: Tensor, words: Tensor | None) -> None:
        """Keep values that were read and changed. words: int32 random bits of each, None where none are needed."""


class Fp32Store:
    """FP32, as it is."""

    in_place, needs_words = True, False

    def __init__(self, values: Tensor) -> None:
        self.tensors = (values,)

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensors[0][start:stop]

    def write(self, start: int, stop: int, values: Tensor, words: Tensor | None) -> None:
        pass


class RemainderStore:
    """A master whose upper half is the BF16 weight, which is written with it."""

    in_place, needs_words = False, False

    def __init__(self, weight: Tensor) -> None:
        """weight: BF16, of all elements, a view of the parameters."""
        self._weight = weight
        zeros = torch.zeros_like(weight, dtype=torch.int16)  # the weight is the master of the first step
        self.tensors = zeros, zeros.new_zeros(weight.numel() // remainder.BYTE, dtype=torch.uint8)

    def read(self, start: int, stop: int) -> Tensor:
        low, up = self.tensors
        first, last = start // remainder.BYTE, -(-stop // remainder.BYTE)
        elements = slice(first * remainder.BYTE, last * remainder.BYTE)
        whole = remainder.join(self._weight[elements], low[elements], up[first:last])
        return whole[start - elements.start : stop - elements.start]

    def write(self, start: int, stop: int, values: Tensor, words: Tensor | None) -> None:
        first, last = start // remainder.BYTE, -(-stop // remainder.BYTE)
        whole = torch.nn.functional.pad(values, (0, last * remainder.BYTE - stop))
        weight = self._weight[start : last * remainder.BYTE]
        weight.copy_(whole)
        low, up = remainder.split(whole, weight)
        self.tensors[0][start : last * remainder.BYTE] = low
        self.tensors[1][first:last] = up


class Bf16Store:
    """BF16, the upper half of FP32, rounded stochastically."""

    in_place, needs_words = False, True

    def __init__(self, numel: int, device: torch.device, run: StageRunner) -> None:
        self._run = run
        self.tensors = (torch.zeros(numel, dtype=torch.bfloat16, device=device),)

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensors[0][start:stop].float()

    def write(self, start: int, stop: int, values: Tensor, words: Tensor | None) -> None:
        assert words is not None
        self.tensors[0][start:stop] = self._run(to_bf16, values=values, words=words)


class BlockStore:
    """Codes and a scale for each block of 64 elements."""

    in_place, needs_words = False, True

    def __init__(self, numel: int, device: torch.device, codes: Codes, run: StageRunner) -> None:
        self._codes = codes
        self._run, self._run_encode = run, run if codes.exact else RUNNERS[False]
        self.tensors = (
            torch.zeros(numel // BLOCK, BLOCK, dtype=codes.code_dtype, device=device),
            torch.zeros(numel // BLOCK, 1, dtype=torch.uint8, device=device),
        )

    def read(self, start: int, stop: int) -> Tensor:
        codes, scales = (tensor[start // BLOCK : stop // BLOCK] for tensor in self.tensors)
        return self._run(self._codes.decode, codes=codes, scales=scales).view(-1)

    def write(self, start: int, stop: int, values: Tensor, words: Tensor | None) -> None:
        assert words is not None
        assert start % BLOCK == stop % BLOCK == 0, f"[{start}, {stop}) is not whole blocks"
        encoded = self._run_encode(self._codes.encode, values=values.view(-1, BLOCK), words=words.view(-1, BLOCK))
        for tensor, new in zip(self.tensors, encoded, strict=True):
            tensor[start // BLOCK : stop // BLOCK] = new


SIGNED: dict[MomentFormat, Codes] = {MomentFormat.int8: Int8(), MomentFormat.fp8: Fp8()}
UNSIGNED: dict[MomentFormat, Codes] = {MomentFormat.int8: RootInt8(), MomentFormat.fp8: UnsignedFp8()}
"""One of each, so that all stores share its kernels."""


def moment_store(
    format: MomentFormat, numel: int, device: torch.device, run: StageRunner = RUNNERS[False], *, unsigned: bool
) -> Store:
    """A moment of `numel` zeros. unsigned: a second moment. run: of the conversions."""
    if format is MomentFormat.fp32:
        return Fp32Store(torch.zeros(numel, device=device))
    if format is MomentFormat.bf16:
        return Bf16Store(numel, device, run)
    return BlockStore(numel, device, (UNSIGNED if unsigned else SIGNED)[format], run)
