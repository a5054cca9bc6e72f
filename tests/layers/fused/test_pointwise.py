"""Compiled chains of pointwise operations against torch's, forward and backward; and where they are compiled.

Compilers take long: all but one chain are traced and differentiated as for a compiler and then run by torch
(`aot_eager`). docs/performance.md has what compiled chains gave.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.layers.fused import pointwise
from megatron_fp4.layers.fused.pointwise import PointwiseImpl, check_pointwise, pointwise_runner
from megatron_fp4.layers.mamba.convolution import causal_conv
from megatron_fp4.layers.mlp import Activation, squared_relu, swiglu
from megatron_fp4.layers.rope import apply_rope
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.numerics.compiled import StageRunner
from megatron_fp4.precision import EmulatedBackend
from megatron_fp4.precision.backends.emulated import compile_obstacle
from megatron_fp4.precision.config import PrecisionConfig
from megatron_fp4.proofs.parity import synthetic_inputs
from megatron_fp4.train.trainable import build_trainable
from tests.helpers.parity import HYBRID, parity_case

DOCUMENTS = torch.tensor([[0] * 3 + [1] * 9 + [2] * 15])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CHAINS: dict[str, tuple[Any, dict[str, Any]]] = {
    "squared ReLU": (squared_relu, {"u_TF": normal(24, 10)}),
    "SwiGLU": (swiglu, {"u_TF": normal(24, 20)}),
    "RoPE": (apply_rope, {"x_BSHE": normal(1, 24, 3, 8), "cos": normal(1, 24, 2), "sin": normal(1, 24, 2, seed=1)}),
    "convolution": (
        causal_conv,
        {
            "x_BSW": normal(1, 24, 6),
            "before_BJW": normal(1, 3, 6),
            "weight": normal(6, 4),
            "bias": normal(6),
            "documents_BI": DOCUMENTS,
        },
    ),
}


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains are traced and not compiled, by kernels of this test's own."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(pointwise, "_runner", {on: StageRunner(on) for on in (False, True)}.get)
    yield
    torch.compiler.reset()


def results(runner: StageRunner, chain: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """The result, and the gradient of every argument that has one. Activations in BF16, angles in FP32."""
    given = {name: value.clone() for name, value in arguments.items()}
    for name, value in given.items():
        if value.is_floating_point():
            given[name] = (value if name in ("cos", "sin") else value.bfloat16()).requires_grad_()
    y = runner(chain, **given)
    y.backward(normal(*y.shape, seed=2).to(y.dtype))
    return [y.detach(), *(value.grad for value in given.values() if value.grad is not None)]


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize("name", CHAINS)
def test_a_traced_chain_is_the_chain(name: str) -> None:
    chain, arguments = CHAINS[name]
    expected, ours = (results(StageRunner(on), chain, arguments) for on in (False, True))
    assert len(ours) == len(expected)
    for theirs, own in zip(expected, ours, strict=True):
        assert torch.equal(theirs, own)


@pytest.mark.skipif(bool(compile_obstacle()), reason="no C++ compiler")
def test_a_compiled_squared_relu_has_the_same_bits() -> None:
    chain, arguments = CHAINS["squared ReLU"]
    expected, ours = (results(StageRunner(on), chain, arguments) for on in (False, True))
    assert all(map(torch.equal, expected, ours))


@pytest.mark.usefixtures("_no_compiler")
@pytest.mark.parametrize(
    "model", [{"rope_base": 10000.0, "activation": Activation.swiglu}, HYBRID], ids=["GPT", "Mamba"]
)
def test_a_model_trains_as_by_torch(model: dict[str, Any]) -> None:
    """Every chain reached, with recomputation, in a model whose losses are those of torch's to the last bit."""
    numbers: dict[PointwiseImpl, list[float]] = {}
    for impl in (PointwiseImpl.torch, PointwiseImpl.compiled):
        case = parity_case(
            PrecisionConfig(),
            pointwise_impl=impl,
            train={"recompute": Recompute.selective},
            **{"seq_length": 16, **model},
        )
        mesh, device = ParallelMesh.single_process(), torch.device("cpu")
        trainable = build_trainable(case.config, case.table, EmulatedBackend(), mesh, device)
        for step in range(2):
            trainable.clock.step = step
            inputs, num_targets = synthetic_inputs(case, mesh, step, device)
            trainable.optimizer.zero_grad()
            loss = trainable.engine.train(inputs.split(1), 1.0 / num_targets, trainable.optimizer.begin_last_microbatch)
            norm = trainable.optimizer.finish_grads()
            numbers.setdefault(impl, []).extend([loss.item(), norm])
            trainable.optimizer.step(norm, lr=1e-3, max_norm=1.0)
    assert numbers[PointwiseImpl.compiled] == numbers[PointwiseImpl.torch]
    runner: Any = pointwise._runner(True)
    chains = {key[0] for key in runner._kernels}
    assert chains == ({apply_rope, swiglu} if model.get("rope_base") else {causal_conv, squared_relu})


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "compiled"),
    [
        (PointwiseImpl.auto, "cuda", torch.bfloat16, True),
        (PointwiseImpl.auto, "cuda", torch.float32, False),
        (PointwiseImpl.auto, "cpu", torch.bfloat16, False),
        (PointwiseImpl.torch, "cuda", torch.bfloat16, False),
        (PointwiseImpl.compiled, "cpu", torch.float32, True),
    ],
    ids=str,
)
def test_where_chains_are_compiled(impl: PointwiseImpl, device: str, dtype: torch.dtype, compiled: bool) -> None:
    context: Any = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert pointwise_runner(impl, context).compiles == compiled


def test_nothing_to_compile_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "compile_obstacle", lambda: "there is no C++ compiler")
    check_pointwise(PointwiseImpl.auto, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"but there is no C\+\+ compiler; set model.pointwise_impl=torch"):
        check_pointwise(PointwiseImpl.compiled, torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_pointwise(PointwiseImpl.torch, torch.device("cuda"))
    with pytest.raises(
        ValueError, match=r"model.pointwise_impl=auto, but the package triton, .* is not installed; set"
    ):
        check_pointwise(PointwiseImpl.auto, torch.device("cuda"))
