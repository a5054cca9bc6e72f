"""Whole training steps through the Transformer Engine backend (on the double): every operand equals the emulated one.

A model is trained with a backend that computes everything twice. Operands are compared bit for bit; products within a
bound, since the order of sums differs, and the emulated ones are handed on, so that the next operands are comparable.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.precision import AmaxScope, EmulatedBackend, LinearPrecision, Operand, nvfp4_paper
from megatron_fp4.precision.backends import Backend, Copy, OperandOrigin, QuantizedOperand
from megatron_fp4.precision.backends.reference import ReferenceBackend
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend
from megatron_fp4.precision.config import PrecisionConfig, Rule
from megatron_fp4.precision.selftest.parts import first_mismatch, reference_parts, te_parts
from megatron_fp4.proofs.parity import synthetic_inputs
from megatron_fp4.train.trainable import build_trainable
from tests.helpers.parity import parity_case
from tests.precision.te import te_double

STEPS = 2


def of_shards(precision: LinearPrecision) -> LinearPrecision:
    def operand(value: Operand) -> Operand:
        return replace(value, amax_scope=AmaxScope.shard)

    return precision.with_operands(operand)


PRECISION = PrecisionConfig(
    recipes={"nvfp4": of_shards(nvfp4_paper(stochastic=False))}, rules=[Rule("head"), Rule("*", use="nvfp4")]
)


@dataclass(frozen=True, eq=False)
class Both(QuantizedOperand):
    """The operands of both backends. count: tensors of TE's, which come first."""

    theirs: QuantizedOperand
    ours: QuantizedOperand
    count: int

    @property
    def of_te(self) -> QuantizedOperand:
        return self.theirs.with_tensors(self.tensors[: self.count])

    @property
    def of_emulation(self) -> QuantizedOperand:
        return self.ours.with_tensors(self.tensors[self.count :])


class BothBackends:
    """Quantizes and multiplies with Transformer Engine and with the emulation, and counts what was compared."""

    def __init__(self) -> None:
        self.te, self.emulated = TransformerEngineBackend(PRECISION), EmulatedBackend()
        self.reference = ReferenceBackend()
        self.compared: Counter[str] = Counter()

    def quantize(self, x: Tensor, origin: OperandOrigin, copies: Sequence[Copy]) -> tuple[QuantizedOperand, ...]:
        theirs, ours = self.te.quantize(x, origin, copies), self.emulated.quantize(x, origin, copies)
        codes = self.reference.quantize(x, origin, copies)
        for copy, a, b, c in zip(copies, theirs, ours, codes, strict=True):
            if copy.operand.quantized:
                parts = te_parts(a, copy)
                mismatch = first_mismatch(parts, reference_parts(c), copy)
                assert mismatch is None, f"step {origin.step}, {origin.name}, {copy.gemm}.{origin.operand}: {mismatch}"
                values, _ = self.emulated._operand(b, torch.float32)
                scales = parts.scales.contiguous().view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
                want = e2m1_values(parts.codes) * scales
                assert torch.equal(want, values), (
                    f"{origin.name}, {copy.gemm}.{origin.operand}: emulated operand differs"
                )
                self.compared[f"{copy.gemm}.{origin.operand}"] += 1
        return tuple(
            Both((*a.tensors, *b.tensors), a.with_tensors(()), b.with_tensors(()), len(a.tensors))
            for a, b in zip(theirs, ours, strict=True)
        )

    def matmul(self, a: Both, b: Both, **settings: Any) -> Tensor:
        into = settings.pop("accumulate_into", None)
        product = self.te.matmul(a.of_te, b.of_te, **settings)
        want = self.emulated.matmul(a.of_emulation, b.of_emulation, **settings)
        bound = 1e-2 * want.abs().max().item() if want.dtype == torch.bfloat16 else 1e-5 * want.abs().max().item()
        assert (product.float() - want.float()).abs().max().item() <= bound, "the products differ by more than rounding"
        self.compared["products"] += 1
        return want if into is None else into.add_(want)


def e2m1_values(codes: Tensor) -> Tensor:
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    return torch.cat([values, -values])[codes.long()]


def train(backend: Backend, mesh: ParallelMesh, parallel: ParallelConfig) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of a few steps."""
    case = parity_case(PRECISION, steps=STEPS)
    config = replace(case.config, parallel=parallel)
    trainable = build_trainable(config, case.table, backend, mesh, torch.device("cpu"))
    optimizer, losses, norms = trainable.optimizer, [], []
    for step in range(STEPS):
        trainable.clock.step = step
        inputs, num_targets = synthetic_inputs(case, mesh, step, torch.device("cpu"))
        optimizer.zero_grad()
        microbatches = inputs.split(config.train.micro_batch)
        loss = trainable.engine.train(microbatches, 1.0 / num_targets, optimizer.begin_last_microbatch)
        norm = optimizer.finish_grads()
        losses.append(loss.item() if trainable.engine.reports_loss else 0.0)
        norms.append(norm)
        optimizer.step(norm, lr=1e-3, max_norm=1.0)
    optimizer.wait_parameters()
    return losses, norms


def test_every_operand_of_training_steps_equals_the_emulated_one(monkeypatch: Any) -> None:
    te_double.install(monkeypatch)
    both = BothBackends()
    train(both, ParallelMesh.single_process(), ParallelConfig())
    linears, microbatches = 8, 4
    for copy in ("fprop.x", "wgrad.x", "dgrad.dy", "wgrad.dy"):
        assert both.compared[copy] == linears * microbatches * STEPS, f"{copy} was not compared for every GEMM"
    assert both.compared["fprop.w"] == linears * STEPS, "the weight is to be quantized once per optimizer step"


def test_transformer_engine_alone_trains_like_the_emulation(monkeypatch: Any) -> None:
    te_double.install(monkeypatch)
    mesh, parallel = ParallelMesh.single_process(), ParallelConfig()
    theirs, ours = (train(b, mesh, parallel) for b in (TransformerEngineBackend(PRECISION), EmulatedBackend()))
    for a, b in zip(theirs[0] + theirs[1], ours[0] + ours[1], strict=True):
        assert abs(a - b) <= 0.02 * abs(b), f"loss or gradient norm {a} with the backend itself, {b} emulated"


def train_rank(process: Process, parallel: ParallelConfig) -> dict[str, int]:
    sys.modules.update(te_double.modules())
    both = BothBackends()
    train(both, build_mesh(parallel, process.world), parallel)
    return dict(both.compared)


def test_tensor_and_pipeline_parallel_shards() -> None:
    te_double.modules()  # the download, or its skip, happens here and not on the ranks
    for compared in run_local(train_rank, 4, ParallelConfig(tp=2, pp=2)):
        assert compared["wgrad.dy"] == 4 * 4 * STEPS, "half of the linears on each stage, 4 microbatches"
