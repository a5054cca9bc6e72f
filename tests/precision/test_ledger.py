"""Every GEMM that the table promises is executed, in its format, and no other: GPT and hybrid, any schedule."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import Group, ParallelMesh, build_mesh
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.models.decoder import Recompute
from megatron_fp4.precision import EmulatedBackend, Format, LinearPrecision, Operand
from megatron_fp4.precision.backends import Copy, OperandOrigin
from megatron_fp4.precision.ledger import GemmLedger, Product, differences
from megatron_fp4.proofs.parity import Case, synthetic_inputs
from megatron_fp4.train.trainable import Trainable, build_trainable
from tests.helpers.parity import HYBRID, parity_case

CPU = torch.device("cpu")


class Ledger:
    """A model on this rank whose GEMMs are counted."""

    def __init__(self, case: Case, parallel: ParallelConfig | None = None, world: Group | None = None) -> None:
        self.case, parallel = case, parallel or ParallelConfig()
        self.mesh = build_mesh(parallel, world) if world else ParallelMesh.single_process()
        self.ledger = GemmLedger(EmulatedBackend())
        config = replace(case.config, parallel=parallel)
        self.trainable: Trainable = build_trainable(config, case.table, self.ledger, self.mesh, CPU)
        self.stages: list[nn.Module] = list(self.trainable.engine.stages)
        self.precisions = {name: case.table[name] for stage in self.stages for name in linears_of(stage)}

    def step(self) -> float:
        """One training step, recorded; returns the loss."""
        inputs, num_targets = synthetic_inputs(self.case, self.mesh, 0, CPU)
        optimizer, engine = self.trainable.optimizer, self.trainable.engine
        optimizer.zero_grad()
        self.ledger.recording = True
        microbatches = inputs.split(self.case.config.train.micro_batch)
        loss = engine.train(microbatches, 1.0 / num_targets, optimizer.begin_last_microbatch)
        self.ledger.recording = False
        optimizer.finish_grads()
        return loss.item()

    def objections(self, *recomputed: str) -> list[str]:
        """The differences of the steps so far to one step of four microbatches."""
        return differences(self.ledger.take(), self.precisions, num_microbatches=4, recomputed=recomputed)


def hybrid(**settings: Any) -> Case:
    return parity_case(**HYBRID, **settings)


@pytest.mark.parametrize("case", [parity_case(), hybrid()], ids=["gpt", "hybrid"])
def test_each_linear_executes_its_three_gemms_once_per_microbatch(case: Case) -> None:
    model = Ledger(case)
    model.step()
    assert model.objections() == []
    assert len(model.precisions) == 9, "eight linears in the blocks and the head"


def test_the_projections_of_mamba_are_quantized() -> None:
    """Convolution and scan take activations only: both projections go through the table's GEMMs, three each."""
    model = Ledger(hybrid())
    model.step()
    counts = Counter[tuple[str, str, str]]()
    for product, number in model.ledger.take().items():
        counts[product.name, product.gemm, product.operands[0].format.name] += number
    for linear in ("blocks.0.mamba.in_proj", "blocks.0.mamba.out_proj"):
        assert [counts[linear, gemm, "nvfp4"] for gemm in ("fprop", "dgrad", "wgrad")] == [4, 4, 4]
    assert counts["head", "fprop", "bf16"] == 4


def test_recomputation_repeats_the_forward_pass_only() -> None:
    model = Ledger(hybrid(train={"recompute": Recompute.full}))
    blocks = [name for name in model.precisions if name.startswith("blocks.")]
    model.step()
    assert model.objections(*blocks) == []
    model.step()
    assert len(model.objections()) == len(blocks), "each repeats Fprop; Dgrad, Wgrad and the head are not repeated"


def test_the_ledger_changes_no_number() -> None:
    case = hybrid()
    plain = build_trainable(case.config, case.table, EmulatedBackend(), ParallelMesh.single_process(), CPU)
    model = Ledger(case)
    inputs, num_targets = synthetic_inputs(case, model.mesh, 0, CPU)
    loss = plain.engine.train(inputs.split(1), 1.0 / num_targets, plain.optimizer.begin_last_microbatch)
    assert model.step() == loss.item()
    for expected, actual in zip(plain.engine.stages[0].parameters(), model.stages[0].parameters(), strict=True):
        assert torch.equal(expected.main_grad, actual.main_grad)


# -- what it finds ----------------------------------------------------------------------------------------------------


def test_a_projection_that_bypasses_its_gemm_is_found() -> None:
    """As a fused kernel does that is handed the weight (Mamba-2's own, with out_proj inside)."""
    model = Ledger(hybrid())
    linear = linears_of(model.stages[0])["blocks.0.mamba.out_proj"]

    def bypass(x_TK: Tensor, tokens: object) -> Tensor:
        return x_TK @ linear.weight.to(x_TK.dtype).T

    linear.forward = bypass  # type: ignore[method-assign]
    model.step()
    objections = model.objections()
    assert len(objections) == 3
    assert "blocks.0.mamba.out_proj fprop x nvfp4, w nvfp4 16x16: executed 0 times for 4 microbatches" in objections


def test_a_precision_that_was_not_assigned_is_found() -> None:
    model = Ledger(parity_case())
    linears_of(model.stages[0])["blocks.1.mlp.up"].precision = LinearPrecision()
    model.step()
    objections = model.objections()
    assert len(objections) == 6, "three GEMMs of the table are missing, three others were executed"
    assert "blocks.1.mlp.up wgrad dy bf16, x bf16: executed 4 times, not in the table" in objections


def test_a_rounding_that_is_not_the_tables_is_found() -> None:
    """Formats alone would not show it."""
    operands = (Operand(Format.nvfp4), Operand(Format.nvfp4, tile=(16, 16)))
    product = Product("head", "dgrad", ("dy", "w"), operands)
    precision = LinearPrecision(dgrad=parity_case().table["blocks.0.attention.qkv"].dgrad)
    objections = differences(Counter({product: 1}), {"head": precision}, num_microbatches=1)
    assert "head dgrad dy nvfp4, w nvfp4 16x16: executed 1 times, not in the table" in objections
    assert "head dgrad dy nvfp4 sr, w nvfp4 16x16: executed 0 times for 1 microbatches" in objections


def test_operands_of_two_linears_in_one_product_are_found() -> None:
    """As a weight cache that is shared by mistake would multiply them."""
    ledger = GemmLedger(EmulatedBackend())
    ledger.recording = True
    index, x = torch.arange(16), torch.ones(16, 16)
    a, b = (
        ledger.quantize(
            x, OperandOrigin(name, role, index, index, Group.single(), seed=1, step=0), [Copy("fprop", Operand(), 1)]
        )[0]
        for name, role in (("head", "x"), ("blocks.0.mlp.up", "w"))
    )
    ledger.matmul(a, b, out_dtype=torch.float32)
    (line,) = differences(ledger.take(), {}, num_microbatches=1)
    assert line == "head with blocks.0.mlp.up fprop x bf16, w bf16: executed 1 times, not in the table"


# -- layouts ----------------------------------------------------------------------------------------------------------


def found_on_rank(process: Process, case: Case, parallel: ParallelConfig) -> list[str]:
    model = Ledger(case, parallel, process.world)
    model.step()
    return model.objections()


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_pipeline_schedules_execute_each_gemm_once(schedule: str) -> None:
    """Zero-bubble schedules that split the backward pass run a custom Function twice if its Wgrad is not queued."""
    parallel = ParallelConfig(pp=2, schedule=schedule)
    for objections in run_local(found_on_rank, 2, hybrid(), parallel):
        assert objections == []
