"""Exact zeros of weight gradients: told apart from those of BF16, counted alike in every layout, named by origin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.bootstrap import Process, start_alone
from megatron_fp4.comm.local import run_local
from megatron_fp4.comm.mesh import ParallelMesh, build_mesh
from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.precision import LinearPrecision, nvfp4_paper
from megatron_fp4.precision.backends.choose import make_backend
from megatron_fp4.precision.health.probe import ChannelProbe
from megatron_fp4.precision.operand import AmaxScope
from megatron_fp4.precision.table import PrecisionTable, Row
from megatron_fp4.proofs.layouts import parse_layout
from megatron_fp4.proofs.parity import Case, synthetic_inputs
from megatron_fp4.train.telemetry.metrics import read_metrics
from megatron_fp4.train.telemetry.monitors.zeros import LinearHealth, linear_health
from megatron_fp4.train.trainable import build_trainable
from tests.helpers.parity import NVFP4, parity_case
from tests.helpers.tiny_run import tiny_run
from tests.train.in_process import make_trainer

Plant = Callable[[str, Tensor], None]
"""Changes a whole logical tensor in place, by its name."""
MOE = MoeConfig(num_experts=4, top_k=2, ffn_hidden=32)
TRAIN = {"global_batch": 4}


def weak_hidden_channels(name: str, w: Tensor) -> None:
    """In every 16x16 tile, a fourth of the channels of the second linear is a thousandth of the others."""
    if name.endswith(("mlp.down.weight", ".1.down.weight")):
        w[:, ::4] *= 1e-3


def weak_first_rows(name: str, w: Tensor) -> None:
    if name.endswith(("mlp.up.weight", "mlp.gate_up.up.weight")):
        w[::4] *= 1e-3


def no_first_rows(name: str, w: Tensor) -> None:
    if name.endswith("mlp.up.weight"):
        w[::4] = 0.0


def nothing(name: str, w: Tensor) -> None:
    pass


def health_on(process: Process, mesh: ParallelMesh, layout: str, case: Case, plant: Plant) -> list[LinearHealth]:
    """Of the first step of a case on this rank of a layout. Collective."""
    config = replace(case.config, parallel=parse_layout(layout).parallel)
    probe = ChannelProbe(make_backend(replace(config.precision, compile=False)))
    trainable = build_trainable(config, case.table, probe, mesh, process.device)
    for stage in trainable.engine.stages:
        for parameter in logical_parameters(stage):
            for rows, where in parameter.placement.pieces():
                whole = torch.ones(where.global_shape)
                plant(where.name, whole)
                parameter.data[rows] *= whole[where.slices]
    inputs, num_targets = synthetic_inputs(case, mesh, 0, process.device)
    probe.begin()
    trainable.optimizer.zero_grad()
    trainable.engine.train(
        inputs.split(config.train.micro_batch), 1.0 / num_targets, trainable.optimizer.begin_last_microbatch
    )
    probe.recording = False
    trainable.optimizer.sum_grads()
    return linear_health(config.model, trainable.engine.stages, probe, trainable.optimizer, mesh, process.device)


def health_alone(case: Case, plant: Plant) -> dict[str, LinearHealth]:
    linears = health_on(start_alone("cpu"), ParallelMesh.single_process(), "tp1", case, plant)
    return {one.name: one for one in linears}


def on_layouts(process: Process, cases: Sequence[tuple[str, Case, Plant]]) -> list[list[LinearHealth]]:
    results = []
    for layout, case, plant in cases:
        mesh = build_mesh(parse_layout(layout).parallel, process.world, experts="E" in case.config.model.letters)
        results.append(health_on(process, mesh, layout, case, plant))
    return results


def test_a_healthy_model_has_no_zeros() -> None:
    linears = health_alone(parity_case(pattern="*-", train=TRAIN), nothing)
    assert {one.zeros for one in linears.values()} == {0}
    assert all(one.lost_columns == one.lost_rows == 0.0 for one in linears.values())
    assert 1.0 < linears["blocks.1.mlp.up"].spread_columns < 2.0, "of a tile of normal numbers: about a factor 2"


@pytest.mark.parametrize("ffn_hidden", [64, 72])
def test_dgrad_that_underflows_is_named(ffn_hidden: int) -> None:
    """Nemotron 3 Super's: 16x16 tiles of the second linear span weak and strong channels. 72 are padded."""
    padded = replace(NVFP4, recipes={"nvfp4": padding(nvfp4_paper())})
    case = parity_case(padded if ffn_hidden % 16 else NVFP4, pattern="*-", ffn_hidden=ffn_hidden, train=TRAIN)
    linears = health_alone(case, weak_hidden_channels)
    up, down = linears["blocks.1.mlp.up"], linears["blocks.1.mlp.down"]
    assert up.makers() == [(("blocks.1.mlp.down", "dgrad"), up.numel // 4)]
    assert up.zeros == up.numel // 4
    assert (down.zeros, down.lost_dx, up.dead_outputs) == (0, ffn_hidden // 4, 0.25)
    assert (down.lost_columns, down.lost_rows) == (0.25, 0.0)
    assert down.spread_columns > 7.0, "log2 of a thousand"


@pytest.mark.parametrize("change", [{"center": True}, {"amax_scope": AmaxScope.group128}])
def test_operands_of_other_arithmetic_are_watched(change: dict[str, Any]) -> None:
    """The mean of an activation apart, and FP32 scales along a row: of experts, one after the other."""
    recipe = nvfp4_paper()
    x = replace(recipe.fprop.x, **change)
    changed = replace(NVFP4, recipes={"nvfp4": replace(recipe, fprop=replace(recipe.fprop, x=x))})
    moe = replace(MOE, num_experts=2, ffn_hidden=128)
    case = parity_case(changed, pattern="*E", hidden=128, head_dim=32, moe=moe, train=TRAIN)
    linears = health_alone(case, weak_hidden_channels)
    up = linears["blocks.1.moe.experts.up"]
    assert up.makers() == [(("blocks.1.moe.experts.down", "dgrad"), up.numel // 8)], "of one expert of two"
    assert "fprop.x" in up.floors


def padding(recipe: LinearPrecision) -> LinearPrecision:
    fprop, dgrad, wgrad = (replace(gemm, pad=True) for gemm in recipe.gemms)
    return LinearPrecision(fprop, dgrad, wgrad)


@pytest.mark.parametrize("activation", [Activation.squared_relu, Activation.swiglu])
def test_fprop_that_underflows_is_named(activation: Activation) -> None:
    """The second stage of the same: hidden channels are lost on the way forward."""
    linears = health_alone(parity_case(pattern="*-", activation=activation, train=TRAIN), weak_first_rows)
    first, rows = ("blocks.1.mlp.up", 4) if activation is Activation.squared_relu else ("blocks.1.mlp.gate_up", 8)
    for name, part in ((first, rows), ("blocks.1.mlp.down", 4)):  # of gate and up, the gradient of the gate is zero
        one = linears[name]
        assert one.makers() == [((first, "fprop"), one.numel // part)]
        assert one.zeros == one.numel // part


def test_zeros_that_bf16_has_are_structural() -> None:
    """Squared ReLU is off for every token; and where nothing is quantized, nothing underflows."""
    case = parity_case(pattern="*-", train=TRAIN)
    bf16 = replace(case, table=PrecisionTable(tuple(Row(row.name, LinearPrecision(), "") for row in case.table.rows)))
    for linears in (health_alone(case, no_first_rows), health_alone(bf16, no_first_rows)):
        for name in ("blocks.1.mlp.up", "blocks.1.mlp.down"):
            one = linears[name]
            assert (one.zeros, one.structural, one.underflow) == (one.numel // 4, one.numel // 4, 0)


def test_every_layout_counts_alike() -> None:
    """Channels, tokens, blocks and experts on other ranks; one group of ranks makes all layouts in turn."""
    dense = parity_case(pattern="*-", seq_length=64, train=TRAIN)
    experts = parity_case(pattern="*E", moe=MOE, train=TRAIN)
    cases: list[tuple[str, Case, Plant]] = [
        ("tp2", dense, weak_hidden_channels),
        ("pp2", dense, weak_first_rows),
        ("cp2", dense, weak_hidden_channels),
        ("dp2 ep2", experts, weak_hidden_channels),
    ]
    references = [health_alone(case, plant) for _, case, plant in cases]
    assert references[3]["blocks.1.moe.experts.up"].dgrad == 8 * 32, "a fourth of the channels of one expert of four"
    for results in run_local(on_layouts, 2, cases):
        for (layout, *_), reference, linears in zip(cases, references, results, strict=True):
            for one in linears:
                assert close(one) == close(reference[one.name]), f"{layout}: {one.name}"


def close(one: LinearHealth) -> dict[str, Any]:
    """Its numbers, the means of logarithms rounded: they are sums in other orders."""
    values = {key: value for key, value in vars(one).items() if not key.startswith("spread")}
    return {**values, "spread_columns": round(one.spread_columns, 9), "spread_rows": round(one.spread_rows, 9)}


def test_a_run_writes_what_is_measured(tmp_path: Path) -> None:
    """Hybrid, experts and multi-token prediction; recomputation sees nothing twice."""
    overrides = (
        *("model.pattern='M*E'", "model.num_layers=3", "model.mtp={depth: 1, pattern: '-', loss_scale: 0.3}"),
        *("model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.ffn_hidden=32"),
        *("model.mamba_num_heads=16", "model.mamba_head_dim=8"),
        *("precision.keep_bf16.last=0", "train.statistics_interval_steps=2", "train.stop_after_steps=2"),
        "train.recompute=full",
    )
    trainer, console = make_trainer(tiny_run(tmp_path, *overrides).overrides)
    assert trainer.fit() == 0
    (values,) = [record for record in read_metrics(tmp_path / "run") if "health/zeros" in record]
    assert values["step"] == 2
    linears = {key.split("/")[1] for key in values if key.count("/") == 2 and key.startswith("health/")}
    assert {"blocks.0.mamba.in_proj", "blocks.2.moe.experts.down", "mtp.0.projection", "head"} <= linears
    (shares,) = [record for record in read_metrics(tmp_path / "run") if "head_gradient/loss" in record]
    assert shares["head_gradient/loss"] + shares["head_gradient/mtp_1"] == pytest.approx(1.0)
    assert 0.15 < shares["head_gradient/mtp_1"] < 0.3, "0.3 of a loss of about the same size"
    table = (tmp_path / "run/health/step_00000002.txt").read_text().splitlines()
    assert len(table) == 1 + len(linears)
    assert not any("underflow" in text for text in console.said)
