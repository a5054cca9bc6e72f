"""The linear op: autograd, main_grad, queue, cache, recompute, and the same numbers in every layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_fp4.comm.mesh import Group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision import (
    Dgrad,
    EmulatedBackend,
    Format,
    Fprop,
    LinearPrecision,
    NonFiniteError,
    Operand,
    Rounding,
    Sharding,
    Signs,
    StepClock,
    WeightCache,
    WgradOutput,
    WgradQueue,
    nvfp4_paper,
    quantized_linear,
)
from megatron_fp4.precision.backends import Copy, OperandOrigin, QuantizedOperand, product
from tests.helpers.distributed import run_distributed

T, N, K = 64, 96, 128
SINGLE = Group.single()


def tensors(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K], w [N, K], dy [T, N]."""
    shapes = {"x": (T, K), "w": (N, K), "dy": (T, N)}
    x, w, dy = (normal(key_of(n), *(torch.arange(size) for size in shape)).to(dtype) for n, shape in shapes.items())
    return x, w, dy


class Linear:
    """A weight with what a layer would hold."""

    def __init__(self, w: Tensor, precision: LinearPrecision, rows: slice = slice(0, T), **groups: Any) -> None:
        self.weight = LogicalParameter.whole("w", w.clone())
        self.precision, self.clock, self.cache = precision, StepClock(seed=3), WeightCache()
        self.rows = torch.arange(T)[rows]
        parts = {"x_group": SINGLE, "w_group": SINGLE, "dy_group": SINGLE}
        index = {"n_index": torch.arange(w.shape[0]), "k_index": torch.arange(w.shape[1])}
        self.sharding = Sharding("blocks.0.mlp.up", **{**parts, **index, **groups})
        self.queue: WgradQueue | None = None
        self.backend = EmulatedBackend()

    def __call__(self, x: Tensor) -> Tensor:
        return quantized_linear(
            x,
            self.weight,
            rows=self.rows,
            sharding=self.sharding,
            precision=self.precision,
            backend=self.backend,
            clock=self.clock,
            cache=self.cache,
            queue=self.queue,
        )

    def run(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, dx and the FP32 dw."""
        self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        x = x.clone().requires_grad_()
        y = self(x)
        y.backward(dy)
        assert x.grad is not None
        return y.detach(), x.grad, self.weight.main_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("native", [True, False], ids=["BF16 GEMM", "widened"])
def test_high_precision_is_a_plain_matmul(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all three GEMMs in bf16 nothing but the weight gradient's type may differ from torch.

    Where the CPU has no BF16 instructions, torch's FP32 product rounded once takes the place of its BF16 product.
    """
    monkeypatch.setattr(product, "cpu_multiplies_bf16", lambda: native)
    x, w, dy = tensors(dtype)
    y, dx, dw = Linear(w, LinearPrecision()).run(x, dy)
    wide = dtype if native else torch.float32
    assert torch.equal(y, (x.to(wide) @ w.to(wide).T).to(dtype))
    assert torch.equal(dx, (dy.to(wide) @ w.to(wide)).to(dtype))
    assert torch.equal(dw, dy.float().T @ x.float())
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recipe", [nvfp4_paper(), LinearPrecision(fprop=nvfp4_paper().fprop)], ids=["all", "fprop"])
def test_quantized_gradients_are_near_the_exact_ones(recipe: LinearPrecision, dtype: torch.dtype) -> None:
    """15% is the level of FP4 noise; a transposed operand or a wrong scale is off by more than 100%."""
    x, w, dy = tensors(dtype)
    exact = (x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double())
    for name, ours, theirs in zip(("y", "dx", "dw"), Linear(w, recipe).run(x, dy), exact, strict=True):
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < 0.22, f"{name}: relative error {error}"


def test_mixed_formats_in_one_gemm() -> None:
    """Any operand may stay in high precision; then only the other one's global scale counts."""
    x, w, dy = tensors()
    half = LinearPrecision(Fprop(x=Operand(Format.nvfp4)), Dgrad(w=Operand(Format.mxfp8)))
    y, dx, _ = Linear(w, half).run(x, dy)
    assert ((y.double() - x.double() @ w.double().T).norm() / y.double().norm()).item() < 0.12
    assert ((dx.double() - dy.double() @ w.double()).norm() / dx.double().norm()).item() < 0.05


def test_gradient_without_main_grad_is_returned() -> None:
    x, w, dy = tensors()
    with_buffer, without = Linear(w, nvfp4_paper()), Linear(w, nvfp4_paper())
    _, _, dw = with_buffer.run(x, dy)
    without(x).backward(dy)
    assert with_buffer.weight.grad is None
    assert without.weight.grad is not None
    assert torch.equal(without.weight.grad, dw.bfloat16())


def test_main_grad_accumulates_and_tells() -> None:
    """Two micro-batches add up in FP32, and `grad_ready` is called once for each."""
    x, w, dy = tensors()
    linear, calls = Linear(w, nvfp4_paper()), []
    linear.weight.grad_ready = lambda: calls.append(1)
    _, _, once = linear.run(x, dy)
    once = once.clone()
    linear(x).backward(dy)
    assert torch.equal(linear.weight.main_grad, once + once)
    assert len(calls) == 2


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("recipe", [nvfp4_paper(), LinearPrecision()], ids=["nvfp4", "bf16"])
def test_bf16_main_grad_is_rounded_once_for_each_backward(recipe: LinearPrecision, deferred: bool) -> None:
    """The product stays FP32 until it is added, computed now or by a zero-bubble pipeline's queue."""
    x, w, dy = tensors()
    linear = Linear(w, recipe)
    _, _, dw = linear.run(x, dy)
    linear.weight.main_grad = total = torch.zeros_like(w, dtype=torch.bfloat16)
    linear.queue = WgradQueue() if deferred else None
    expected = torch.zeros_like(total)
    for _ in range(3):
        linear(x).backward(dy)
        if linear.queue is not None:
            linear.queue.drain()
        expected = (expected.float() + dw).bfloat16()
        assert torch.equal(total, expected)


def test_queue_defers_and_changes_nothing() -> None:
    """A zero-bubble pipeline computes dw later; if that changed a bit, schedules would not be comparable."""
    x, w, dy = tensors()
    _, _, expected = Linear(w, nvfp4_paper()).run(x, dy)
    linear = Linear(w, nvfp4_paper())
    linear.queue = queue = WgradQueue()
    _, _, dw = linear.run(x, dy)
    assert dw.abs().sum() == 0
    linear.clock.step += 1  # keys are those of the forward pass
    queue.drain()
    assert torch.equal(dw, expected)
    queue.drain()
    assert torch.equal(dw, expected), "draining twice must not add twice"


class Counting(EmulatedBackend):
    """Remembers the copies that were asked for, by tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, list[list[str]]] = {"x": [], "w": [], "dy": []}

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        self.asked[origin.operand].append([copy.gemm for copy in copies])
        return super().quantize(x, origin, copies)


def test_weights_are_quantized_once_per_version() -> None:
    """More often: wasted time in each micro-batch. Less often: training on stale weights."""
    x, w, dy = tensors()
    linear = Linear(w, nvfp4_paper())
    linear.backend = Counting()
    linear.run(x, dy)
    linear.clock.step += 1  # these weights are rounded to nearest: the same at each step
    linear.run(x, dy)
    assert linear.backend.asked["w"] == [["fprop", "dgrad"]]
    with torch.no_grad():
        linear.weight.mul_(2)
    linear.clock.weights_version += 1
    y, _, _ = linear.run(x, dy)
    assert len(linear.backend.asked["w"]) == 2
    assert torch.equal(y, Linear(w * 2, nvfp4_paper()).run(x, dy)[0])
    linear.precision = LinearPrecision()
    assert torch.equal(linear(x), x @ linear.weight.T), "a changed precision must not meet old codes"
    linear.precision, linear.backend = nvfp4_paper(), Counting()
    linear.run(x, dy)
    assert len(linear.backend.asked["w"]) == 1, "another backend must not meet operands that it did not make"


def multiply(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(3)


def descend(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()


def replace(weight: Tensor) -> None:
    weight.data = weight.data * 3


@pytest.mark.parametrize("change", [multiply, descend, replace])
def test_weights_that_anybody_changed_are_quantized_again(change: Callable[[Tensor], None]) -> None:
    """Without a word to the clock, as a trial of one layer does it; training on the old copy would look plausible."""
    x, w, dy = tensors()
    linear = Linear(w.clone(), nvfp4_paper())
    linear.run(x, dy)
    change(linear.weight)
    y, dx, _ = linear.run(x, dy)
    expected = Linear(linear.weight.detach().clone(), nvfp4_paper()).run(x, dy)
    assert torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1])
    y = linear(x.requires_grad_())
    change(linear.weight)
    with pytest.raises(RuntimeError, match="changed"):
        y.backward(dy)


def at_step(linear: Linear, step: int, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    linear.clock.step = step
    return linear.run(x, dy)


@pytest.mark.parametrize("gemm", ["fprop", "dgrad"])
def test_stochastic_weights_are_rounded_with_the_noise_of_their_step(gemm: str) -> None:
    """Weights of one version meet two steps where an evaluation comes between an update and the next step.

    Training would go on with the noise of the step before: an evaluation would change it, and so would a resume.
    """
    x, w, dy = tensors()
    stochastic = Operand(Format.nvfp4, rounding=Rounding.sr)
    precision = LinearPrecision(**{gemm: {"fprop": Fprop, "dgrad": Dgrad}[gemm](w=stochastic)})
    linear = Linear(w, precision)
    first = at_step(linear, 3, x, dy)
    with torch.no_grad():
        linear(x)  # an evaluation, which computes no gradient
    second = at_step(linear, 4, x, dy)
    changed = {"fprop": 0, "dgrad": 1}[gemm]
    assert not torch.equal(first[changed], second[changed]), "the noise of another step"
    for expected, got in zip(at_step(Linear(w, precision), 4, x, dy), second, strict=True):
        assert torch.equal(expected, got), "not what a run computes that begins at this step"


def test_signs_of_the_step_cancel_with_kept_weights() -> None:
    """Weights that were transformed with the signs of another step: a relative error of 1.7 instead of 0.13."""
    x, w, dy = tensors()
    turned = Operand(Format.nvfp4, rht_size=16, rht_signs=Signs.per_step)
    linear = Linear(w, LinearPrecision(Fprop(turned, turned)))
    for step in (3, 4):
        y, _, _ = at_step(linear, step, x, dy)
        exact = x.double() @ w.double().T
        assert ((y.double() - exact).norm() / exact.norm()).item() < 0.2, f"step {step}"


def test_an_evaluation_makes_only_what_it_multiplies() -> None:
    """Copies for a backward pass that never comes cost an evaluation a third of its time."""
    x, w, _ = tensors()
    linear = Linear(w, nvfp4_paper())
    linear.backend = Counting()
    with torch.no_grad():
        y = linear(x)
    assert linear.backend.asked == {"x": [["fprop"]], "w": [["fprop"]], "dy": []}
    assert torch.equal(y, linear(x)), "the same numbers with and without a backward pass"


def test_changed_weights_between_forward_and_backward_are_an_error() -> None:
    x, w, dy = tensors()
    linear = Linear(w, nvfp4_paper())
    y = linear(x.requires_grad_())
    linear.clock.weights_version += 1
    with pytest.raises(RuntimeError, match=r"update=0.*update=1"):
        y.backward(dy)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_changes_nothing(reentrant: bool) -> None:
    """Noise has an address, so a recomputed forward pass sees the same numbers."""
    x, w, dy = tensors()
    expected = Linear(w, nvfp4_paper()).run(x, dy)
    linear = Linear(w, nvfp4_paper())
    linear.weight.main_grad = torch.zeros(N, K)
    x = x.clone().requires_grad_()
    y = checkpoint(linear, x, use_reentrant=reentrant)
    y.backward(dy)
    for name, ours, theirs in zip(("y", "dx", "dw"), (y, x.grad, linear.weight.main_grad), expected, strict=True):
        assert torch.equal(ours, theirs), name


def test_saved_memory_is_x() -> None:
    """Per linear, backward keeps x itself (shared with its producer) and one scalar: nothing is copied."""
    x, w, _ = tensors()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Linear(w, nvfp4_paper())(x.requires_grad_())
    assert [tuple(t.shape) for t in saved] == [(T, K), ()]
    assert saved[0].data_ptr() == x.data_ptr()


def test_wgrad_in_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "cpu_multiplies_bf16", lambda: True)
    x, w, dy = tensors()
    recipe = LinearPrecision(wgrad_output=WgradOutput.compute)
    _, _, dw = Linear(w, recipe).run(x, dy)
    assert torch.equal(dw, (dy.T @ x).float())


@pytest.mark.parametrize("operand", ["x", "w", "dy"])
def test_bad_numbers_name_layer_and_operand(operand: str) -> None:
    x, w, dy = tensors()
    {"x": x, "w": w, "dy": dy}[operand][5, 7] = float("nan")
    with pytest.raises(NonFiniteError, match=f"blocks.0.mlp.up: operand {operand} contains NaN"):
        Linear(w, nvfp4_paper()).run(x, dy)


def _layout(rank: int, world_size: int, layout: str) -> list[Any]:
    """This rank's y, dx (or partial sums of them) and dw, as FP32 arrays, for a layout over two ranks."""
    return [result.float().numpy() for result in _run_layout(rank, layout)]


def _run_layout(rank: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    x, w, dy = tensors()
    group = Group("both", (0, 1), rank, dist.group.WORLD)
    n, k, t = (slice(rank * size // 2, (rank + 1) * size // 2) for size in (N, K, T))
    if layout == "column":  # output features are split
        linear = Linear(w[n], nvfp4_paper(), w_group=group, dy_group=group, n_index=torch.arange(N)[n])
        return linear.run(x, dy[:, n].contiguous())
    if layout == "row":  # input features are split
        linear = Linear(w[:, k].contiguous(), nvfp4_paper(), w_group=group, x_group=group, k_index=torch.arange(K)[k])
        return linear.run(x[:, k].contiguous(), dy)
    linear = Linear(w, nvfp4_paper(), rows=t, x_group=group, dy_group=group)  # tokens are split (cp)
    return linear.run(x[t], dy[t])


@pytest.mark.parametrize("layout", ["column", "row", "tokens"])
def test_every_layout_sees_the_same_operands(layout: str) -> None:
    """Operands are bitwise equal, so slices are equal and sums differ by their order only.

    Without the amax group, or with noise addressed by local indices, the difference is about 10%.
    """
    x, w, dy = tensors()
    y, dx, dw = Linear(w, nvfp4_paper()).run(x, dy)
    first, second = ([torch.from_numpy(part) for part in parts] for parts in run_distributed(_layout, 2, layout))
    join = {"column": (1, None, 0), "row": (None, 1, 1), "tokens": (0, 0, None)}[layout]
    for name, whole, a, b, dim in zip(("y", "dx", "dw"), (y, dx, dw), first, second, join, strict=True):
        if dim is None:
            error = ((a + b - whole.float()).norm() / whole.float().norm()).item()
            assert error < (2e-6 if name == "dw" else 5e-3), f"{name}: sum of parts is off by {error}"
        else:
            assert torch.equal(torch.cat([a, b], dim), whole.float()), f"{name}: parts are not slices of the whole"
