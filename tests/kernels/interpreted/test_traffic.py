"""Bytes that the kernels move, counted where they are loaded and stored, with the tiles that a GPU has.

The floor of a quantizer is one reading of its tensor, and 0.5625 bytes written per element and copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from megatron_fp4.kernels.multiply import multiply
from megatron_fp4.kernels.values import Target
from megatron_fp4.precision import nvfp4_paper
from megatron_fp4.precision.backends import copies_of
from megatron_fp4.precision.backends.triton import TritonBackend
from megatron_fp4.precision.config import PrecisionConfig
from tests.kernels.interpreted.test_operands import origin
from tests.kernels.interpreted.test_products import DECODED, NVFP4, PERSISTENT, as_stored, operand
from tests.kernels.interpreter_repairs import device_code

ROWS, COLUMNS = 128, 256
"""Whole tiles of every quantizer, so that nothing is masked."""
COPY = 0.5625
"""Bytes of a code and its share of a scale."""
BESIDE = 0.27
"""Most bytes per element that are read beside the tensor: an amax, and words of noise, which tiles share."""


@dataclass
class Launch:
    """read, written: addresses, one for each byte that a program asks for."""

    kernel: str
    read: list[np.ndarray] = field(default_factory=list)
    written: list[np.ndarray] = field(default_factory=list)

    def times(self, which: str, tensor: Tensor) -> np.ndarray:
        """How often each byte of `tensor` is asked for."""
        addresses = np.concatenate([*getattr(self, which), np.empty(0, np.int64)]) - tensor.data_ptr()
        inside = addresses[(addresses >= 0) & (addresses < tensor.nbytes)]
        return np.bincount(inside, minlength=tensor.nbytes)

    def total(self, which: str) -> int:
        return sum(map(len, getattr(self, which)))


@contextmanager
def traffic() -> Iterator[list[Launch]]:
    """Every launch and what it moves. A descriptor's loads are masked loads to the interpreter."""
    launches: list[Launch] = []
    run, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def bytes_at(pointers: Any, mask: Any) -> np.ndarray:
        first = np.asarray(pointers.data)[np.asarray(mask.data)].reshape(-1, 1).astype(np.int64)
        return (first + np.arange(pointers.get_element_ty().primitive_bitwidth // 8)).ravel()

    def launched(executor: Any, *arguments: Any, **options: Any) -> None:
        launches.append(Launch(executor.fn.__name__))
        run(executor, *arguments, **options)

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].read.append(bytes_at(pointers, mask))
        return load(self, pointers, mask, *rest, **named)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].written.append(bytes_at(pointers, mask))
        return store(self, pointers, value, mask, *rest)

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", launched),
        mock.patch.object(builder, "create_masked_load", loaded),
        mock.patch.object(builder, "create_masked_store", stored),
    ):
        yield launches


def print_line(launch: Launch, elements: int, copies: int) -> None:
    """A line of the table of docs/kernels.md (pytest -s)."""
    read, written = (launch.total(which) / elements for which in ("read", "written"))
    print(f"\n| {launch.kernel} | {read:.2f} | {written:.4f} | 2 | {copies * COPY} |", end="")


@pytest.mark.parametrize(
    ("tensor", "kernels"),
    [
        ("x", {"transformed_amax_kernel": 0, "rows_kernel": 1, "lanes_kernel": 1}),
        ("w", {"amax_kernel": 0, "lanes_kernel": 2}),
        ("dy", {"transformed_amax_kernel": 0, "rows_kernel": 1, "lanes_kernel": 1}),
    ],
    ids=["x", "w", "dy"],
)
def test_a_quantizer_reads_once_and_writes_codes(
    tensor: str, kernels: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's recipe on Blackwell: each byte of the tensor is read once, each byte of a copy written once."""
    blackwell = Target.of_capability((10, 0), 2)
    monkeypatch.setattr(Target, "of", staticmethod(lambda device: blackwell))
    x, backend = torch.randn(ROWS, COLUMNS).bfloat16(), TritonBackend(PrecisionConfig(compile=False))
    with device_code(), traffic() as launches:
        copies = backend.quantize(x, origin(x, tensor), copies_of(nvfp4_paper())[tensor])
    launches = [launch for launch in launches if launch.kernel != "words_kernel"]
    assert [launch.kernel for launch in launches] == list(kernels)
    outputs = [part for copy in copies for part in copy.tensors[:2]]
    for launch, count in zip(launches, kernels.values(), strict=True):
        print_line(launch, x.numel(), count)
        assert (launch.times("read", x) == 1).all()
        assert launch.total("read") <= x.nbytes + BESIDE * x.numel()
        assert launch.total("written") == count * COPY * x.numel()
    for part in outputs:
        assert (sum(launch.times("written", part) for launch in launches) == 1).all()


@pytest.mark.parametrize("target", [DECODED, PERSISTENT], ids=["decoded", "TMA"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["to BF16", "added to FP32"])
def test_a_product_reads_codes_and_scales(target: Target, accumulate: bool) -> None:
    """An operand once per tile of the other, in 0.5625 bytes an element; the result written once, and read if added."""
    tile = target.gemm
    M, N, K = 2 * tile.rows, 3 * tile.columns, 2 * tile.depth
    a, b = (as_stored(operand(lines, K, NVFP4, 0, exact=True), target) for lines in (M, N))
    out = torch.zeros(M, N, dtype=torch.float32 if accumulate else torch.bfloat16)
    with device_code(), traffic() as launches:
        multiply(a, b, out, target=target, accumulate=accumulate)
    (launch,) = launches
    for one, times in ((a, N // tile.columns), (b, M // tile.rows)):
        for part in (one.codes, one.scales):
            assert (launch.times("read", part) == times).all()
        assert one.codes.nbytes + one.scales.nbytes == COPY * one.lines * K
    assert (launch.times("read", out) == accumulate).all()
    assert (launch.times("written", out) == 1).all()
    assert launch.total("written") == out.nbytes


@pytest.mark.parametrize("fault", ["twice", "never"])
def test_a_planted_fault_is_seen(fault: str) -> None:
    x = torch.zeros(8)
    address = np.arange(x.data_ptr(), x.data_ptr() + x.nbytes)
    launch = Launch("planted", [address, address[:4]] if fault == "twice" else [address[4:]])
    assert not (launch.times("read", x) == 1).all()
