"""One forward and backward pass of every distinct GEMM of a run, for `preflight` and `crosscheck`.

One idea: a kernel goes wrong per local shape and precision, not per layer. So every distinct pair of the run, with the
shapes that a rank will really have, is computed once through `quantized_linear` itself and compared with the same
products in FP32. The bounds are loose: they tell a broken kernel from rounding, not a good recipe from a bad one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group
from megatron_fp4.numerics import key_of, normal
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.linear_op import LinearSite, WeightCache, quantized_linear
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import gemm_formats
from megatron_fp4.proofs.shards import Shard
from megatron_fp4.train.checked import CheckedConfig

MAX_CPU_TOKENS = 256
"""Rows of x on a CPU, where real kernels are not at stake and the weights' sizes are."""
MAX_ERROR = 0.6
"""Relative error of a quantized product of Gaussian tensors (NVFP4 with stochastic rounding: about 0.2)."""


@dataclass(frozen=True)
class Probe:
    """A local weight shape `[N, K]` with a precision, and the linears that have it. tokens: rows of x."""

    names: tuple[str, ...]
    shape: tuple[int, int]
    tokens: int
    precision: LinearPrecision

    def __str__(self) -> str:
        more = f" (and {len(self.names) - 1} more)" if len(self.names) > 1 else ""
        formats = "/".join(gemm_formats(self.precision))
        return f"{self.names[0]}{more}, weight {self.shape[0]}x{self.shape[1]}, {self.tokens} tokens, {formats}"


def distinct_probes(checked: CheckedConfig, shards: Sequence[Shard], device: torch.device) -> list[Probe]:
    """Of all phases of the run and of all given shards, in the order of the model."""
    config = checked.config
    tokens = config.train.micro_batch * config.data.seq_length // config.parallel.cp
    if device.type == "cpu":
        tokens = min(tokens, MAX_CPU_TOKENS)
    found: dict[tuple[tuple[int, int], LinearPrecision], list[str]] = {}
    for (_, table), shard in itertools.product(checked.plan.phases, shards):
        for name, shape in shard.shapes.items():
            names = found.setdefault((shape, table[name]), [])
            if name not in names:
                names.append(name)
    return [Probe(tuple(names), shape, tokens, precision) for (shape, precision), names in found.items()]


def probe_tensors(probe: Probe, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gaussian x `[T, K]`, w `[N, K]`, dy `[T, N]`: the same on every machine."""
    N, K = probe.shape
    shapes = {"x": (probe.tokens, K, 1.0), "w": (N, K, 0.02), "dy": (probe.tokens, N, 1e-3)}
    return {
        name: (normal(key_of("probe", name), *(torch.arange(s, device=device) for s in (R, C))) * scale).to(dtype)
        for name, (R, C, scale) in shapes.items()
    }


def run_probe(probe: Probe, backend: Backend, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What is wrong with the three GEMMs, one line each; empty if nothing is. A refusal is an exception."""
    tensors = probe_tensors(probe, device, dtype)
    x, w, dy = tensors["x"].requires_grad_(), torch.nn.Parameter(tensors["w"]), tensors["dy"]
    w.main_grad = torch.zeros(probe.shape, device=device)  # type: ignore[attr-defined]
    alone = Group.single()
    rows, n_index, k_index = (torch.arange(size, device=device) for size in (probe.tokens, *probe.shape))
    y = quantized_linear(
        x,
        w,
        rows=rows,
        site=LinearSite(probe.names[0], alone, alone, alone, n_index, k_index),
        precision=probe.precision,
        backend=backend,
        clock=StepClock(seed=1),
        cache=WeightCache(),
    )
    y.backward(dy)
    assert x.grad is not None
    wide = {name: tensor.detach().float() for name, tensor in tensors.items()}
    results = {
        "fprop (y)": (y.detach(), wide["x"] @ wide["w"].T),
        "dgrad (gradient of x)": (x.grad, wide["dy"] @ wide["w"]),
        "wgrad (gradient of the weight)": (w.main_grad, wide["dy"].T @ wide["x"]),  # type: ignore[attr-defined]
    }
    return [f"{probe}: {name} {what}" for name, pair in results.items() if (what := _objection(*pair))]


def _objection(result: Tensor, exact: Tensor) -> str:
    result = result.float()
    if not bool(torch.isfinite(result).all()):
        return f"has {int((~torch.isfinite(result)).sum())} of {result.numel()} elements that are NaN or Inf"
    if not bool(result.any()):
        return "is all zero"
    error = ((result - exact).norm() / exact.norm()).item()
    return f"has a relative error of {error:.2f}, above {MAX_ERROR}" if error > MAX_ERROR else ""
