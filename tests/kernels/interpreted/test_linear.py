"""A linear by the kernels: its results, what it launches, what it keeps, and what it leaves to the emulation."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.planning.footprint import LiveBytes
from megatron_fp4.precision import EmulatedBackend, Format, LinearPrecision, Operand, Wgrad, WgradOutput, nvfp4_paper
from megatron_fp4.precision.backends import NonFiniteWatch, copies_of
from megatron_fp4.precision.backends.triton import TritonBackend
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.recipes import mxfp8
from megatron_fp4.precision.spec import Fprop
from tests.kernels.interpreted.test_operands import origin
from tests.models.test_count import load
from tests.planning.test_footprint import planned, real_forward, settings_for
from tests.precision.grouped.test_grouped_linear import Experts, routed
from tests.precision.test_linear_op import Linear, tensors

WITHOUT_LAUNCH = {"empty", "view", "alias", "select", "slice", "detach", "unbind", "_unsafe_view", "as_strided", "t"}
"""Operations of torch that make no kernel on a GPU."""


@contextmanager
def launches() -> Iterator[list[str]]:
    """The kernels that are launched, and torch's operations that a GPU would run a kernel for."""
    log: list[str] = []
    run = interpreter.GridExecutor.__call__

    def logged(executor: Any, *arguments: Any, **options: Any) -> None:
        log.append(executor.fn.__name__)
        with mock.patch.object(Operations, "silent", True):
            run(executor, *arguments, **options)

    class Operations(TorchDispatchMode):
        silent = False

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if not self.silent and name not in WITHOUT_LAUNCH:
                log.append(name)
            return func(*args, **(kwargs or {}))

    with mock.patch.object(interpreter.GridExecutor, "__call__", logged), Operations():
        yield log


def test_launches_of_a_linear() -> None:
    """The paper's recipe: 4 forward, 7 backward, 2 per step for the weight, and none by torch but one memset for many.

    x's copy for Wgrad is made in the forward pass and kept as codes; the keys of the noise are hashed on the host.
    """
    x, w, dy = tensors()
    copies, places = copies_of(nvfp4_paper()), {"x": origin(x, "x"), "w": origin(w, "w"), "dy": origin(dy)}
    backend = TritonBackend(PrecisionConfig(compile=False), NonFiniteWatch())
    backend.quantize(x, places["x"], copies["x"])  # the memset, and the signs of the transform on the host
    with launches() as log:
        fprop_x, wgrad_x = backend.quantize(x, places["x"], copies["x"])
        assert log == ["transformed_amax_kernel", "rows_kernel", "lanes_kernel"]
        log.clear()
        fprop_w, dgrad_w = backend.quantize(w, places["w"], copies["w"])
        assert log == ["amax_kernel", "lanes_kernel"]
        log.clear()
        dgrad_dy, wgrad_dy = backend.quantize(dy, places["dy"], copies["dy"])
        assert log == ["transformed_amax_kernel", *["words_kernel", "rows_kernel"], *["words_kernel", "lanes_kernel"]]
        log.clear()
        backend.matmul(fprop_x, fprop_w, out_dtype=x.dtype)
        backend.matmul(dgrad_dy, dgrad_w, out_dtype=x.dtype)
        backend.matmul(wgrad_dy, wgrad_x, out_dtype=torch.float32, accumulate_into=torch.empty(96, 128))
        assert log == ["gemm_kernel"] * 3


def test_what_waits_for_the_backward_pass_takes_four_and_a_half_bits() -> None:
    x, _, _ = tensors()
    _, wgrad_x = TritonBackend(PrecisionConfig(compile=False)).quantize(x, origin(x), copies_of(nvfp4_paper())["x"])
    codes, scales, amax = wgrad_x.tensors
    assert 8 * (codes.nbytes + scales.nbytes) == 4.5 * x.numel()
    assert amax.numel() == 1


def test_the_plan_is_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the byte, of a whole model; beside it only pieces of 4 KiB, from which amaxes are cut, here without a rest."""
    config = replace(load("gpt_tiny"), num_layers=1, vocab_size=1024)
    settings = settings_for(config, quantized=True, backend=BackendName.triton)
    backend = TritonBackend(PrecisionConfig(compile=False))
    monkeypatch.setattr(backend, "_zeros", lambda count, device: torch.zeros(count, dtype=torch.int32))
    forward, _, _ = real_forward(config, ParallelMesh.single_process(), settings, backend=backend)
    with LiveBytes() as live:
        graph = forward().grad_fn
        gc.collect()  # the interpreter's arguments of a launch are circles
        alive = live.now
    assert planned(config, settings).kept == alive
    del graph


RHT_32 = nvfp4_paper().with_operands(lambda o: replace(o, rht_size=32) if o.rht_size else o)
HALF = LinearPrecision(
    Fprop(x=Operand(), w=Operand(Format.nvfp4)), wgrad=Wgrad(Operand(Format.nvfp4), Operand(Format.mxfp8))
)


@pytest.mark.parametrize(
    "precision",
    [nvfp4_paper(), replace(nvfp4_paper(), wgrad_output=WgradOutput.compute), RHT_32, HALF, mxfp8()],
    ids=["paper", "Wgrad in BF16", "RHT 32: Wgrad emulated", "mixed operands", "mxfp8"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_equals_the_emulation(precision: LinearPrecision, dtype: torch.dtype) -> None:
    """Operands are equal to the bit, so that results differ by the order of an FP32 sum at most."""
    x, w, dy = tensors(dtype)
    results = []
    for backend in (EmulatedBackend(), TritonBackend(PrecisionConfig(compile=False))):
        linear = Linear(w, precision)
        linear.backend = backend
        results.append(linear.run(x, dy))
    for name, expected, ours in zip(("y", "dx", "dw"), *results, strict=True):
        assert expected.dtype == ours.dtype
        error = (expected.double() - ours.double()).norm() / expected.double().norm()
        assert error < (1e-4 if expected.dtype == torch.bfloat16 else 1e-6), f"{name}: {error}"


def test_experts_by_the_kernels() -> None:
    """Segment by segment: the operands are the emulation's, sums differ in their order only."""
    case = routed([[5], [0], [1], [0]])
    theirs, ours = (
        Experts(nvfp4_paper(), backend).run(*case)
        for backend in (TritonBackend(PrecisionConfig(compile=False)), EmulatedBackend())
    )
    for name, one, other in zip(("y", "dx", "dw"), theirs, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-2, msg=f"{name} differs from the emulation")
