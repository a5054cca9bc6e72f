"""The bytes of optimizer state that `plan` says are those of the tensors that live between two steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh, draw_mesh
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.models.decoder import Decoder, whole_model
from megatron_fp4.optim import Algorithm, OptimConfig, Zero1Optimizer
from megatron_fp4.optim.config import MainGradFormat
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat, MomentsConfig
from megatron_fp4.planning.footprint import LiveBytes
from megatron_fp4.planning.held import GradientBytes, bytes_per_parameter, opened_bytes
from megatron_fp4.planning.memory import stage_memory
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.precision import StepClock
from megatron_fp4.precision.backends.emulated import EmulatedBackend
from tests.models.test_count import load

FP32, BF16, INT8, FP8 = MomentFormat.fp32, MomentFormat.bf16, MomentFormat.int8, MomentFormat.fp8
EXPERTS = MoeConfig(num_experts=8, ffn_hidden=64)
MODEL = replace(load("hybrid_tiny"), vocab_size=4096)


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize(
    ("master", "moments"),
    [
        (MasterFormat.fp32, MomentsConfig()),
        (MasterFormat.remainder, MomentsConfig()),
        (MasterFormat.fp32, MomentsConfig(BF16, BF16, BF16)),
        (MasterFormat.remainder, MomentsConfig(INT8, FP8, INT8)),
        (MasterFormat.remainder, MomentsConfig(FP8, INT8, FP8)),
        (MasterFormat.fp32, MomentsConfig(INT8, FP32, BF16)),
    ],
)
def test_planned_state_is_what_is_kept(algorithm: Algorithm, master: MasterFormat, moments: MomentsConfig) -> None:
    optim = OptimConfig(algorithm=algorithm, master=master, moments=moments)
    mesh = ParallelMesh.single_process()
    context = LayerContext.of(mesh, EmulatedBackend(compile=False), StepClock(0), torch.bfloat16, torch.device("cpu"))
    model = Decoder(MODEL, context, whole_model(MODEL))
    optimizer = Zero1Optimizer(model.named_parameters(), optim, mesh, True)
    settings = RankSettings(optim=optim, seq_length=64)
    kept = sum(tensor.nbytes for tensor in optimizer.kept_tensors())
    assert kept == pytest.approx(stage_memory(MODEL, whole_model(MODEL), settings)["optimizer"], rel=2e-3)
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert kept == pytest.approx(bytes_per_parameter(MODEL, settings)["optimizer"] * elements, rel=2e-3)
    if algorithm is Algorithm.adamw:
        optimizer.zero_grad()
        norm = optimizer.finish_grads()
        with LiveBytes() as live:
            optimizer.step(norm, lr=1e-3, max_norm=1.0)
        opened = opened_bytes(MODEL, [whole_model(MODEL)], settings)
        assert live.peak == pytest.approx(opened, rel=0.02) if optim.keeps_compact else live.peak < 4096


@pytest.mark.parametrize("axes", [{"dp": 1}, {"dp": 2}, {"dp": 4, "tp": 2}, {"dp": 8, "ep": 4}])
@pytest.mark.parametrize("main_grads", MainGradFormat)
def test_planned_gradients_are_what_is_kept(main_grads: MainGradFormat, axes: dict[str, int]) -> None:
    optim, meta = OptimConfig(main_grads=main_grads), torch.device("meta")
    dp, parallel = axes["dp"], ParallelConfig(tp=axes.get("tp", 1), ep=axes.get("ep", 1))
    mesh = draw_mesh(parallel, dp * parallel.tp, rank=0)
    model = replace(MODEL, num_layers=4, pattern="M*-E", moe=EXPERTS) if parallel.ep > 1 else MODEL
    context = LayerContext.of(mesh, EmulatedBackend(compile=False), StepClock(0), torch.bfloat16, meta)
    decoder = Decoder(model, context, whole_model(model))
    trained = [(name, parameter) for name, parameter in decoder.named_parameters() if parameter.requires_grad]
    optimizer = Zero1Optimizer(trained, optim, mesh, True)
    settings = RankSettings(optim=optim, seq_length=64, dp=dp, tp=parallel.tp, ep=parallel.ep)
    planned = stage_memory(model, whole_model(model), settings)["main gradients"]
    assert sum(tensor.nbytes for tensor in optimizer.gradient_tensors()) == pytest.approx(planned, rel=1e-2)
    narrow = main_grads is MainGradFormat.bf16 and dp > 1
    common = bytes_per_parameter(model, replace(settings, tp=1, ep=1))["main gradients"]
    assert common == pytest.approx(2 + 4 / dp if narrow else 4.0, rel=1e-2)
    planned = GradientBytes.of(model, [whole_model(model)], settings)
    for of_experts, expected in ((False, planned.common), (True, planned.experts)):
        buckets = [each for each in optimizer.buckets if each.slots[0].placement.of_experts is of_experts]
        sent = sum(each.numel * each.kind.sums.itemsize for each in buckets)
        assert sent == pytest.approx(expected, rel=1e-2), "what a rank sends to be summed"


def test_bytes_per_parameter_of_large_models() -> None:
    """Vectors and convolutions, which keep FP32 moments, are too few to be seen."""
    model = replace(load("nemotron_h_12b"), vocab_size=131072)
    each = RankSettings(optim=OptimConfig(master=MasterFormat.remainder, moments=MomentsConfig(INT8, FP8)))
    assert bytes_per_parameter(model, each)["optimizer"] == pytest.approx(2.125 + 2 * (1 + 1 / 64), rel=1e-3)
