"""What `plan` says of Muon is what the optimizer has, divides and sends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fp4.comm.mesh import DrawnGroup, ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.models.count import count_flops, logical_shapes
from megatron_fp4.models.decoder import whole_model
from megatron_fp4.optim import Algorithm, OptimConfig, Zero1Optimizer, state_bytes
from megatron_fp4.optim.layout import make_buckets
from megatron_fp4.optim.muon.choice import is_muons, matrices_of
from megatron_fp4.optim.muon.exchange import MatrixExchange
from megatron_fp4.planning.memory import stage_memory
from megatron_fp4.planning.muon import MuonShare, whole_flops
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.traffic import bytes_sent
from tests.models.test_count import load
from tests.optim.synthetic import make_parameters

MUON = OptimConfig(algorithm=Algorithm.muon, bucket_mib=0.01)
MODEL = replace(load("hybrid_tiny"), vocab_size=128)
STAGE = whole_model(MODEL)
SHARE_AT_12B = 0.00286


def test_state_is_one_moment_for_matrices_and_two_for_the_rest() -> None:
    optimizer = Zero1Optimizer(make_parameters().items(), MUON, ParallelMesh.single_process(), False)
    held = sum(tensor.nbytes for shard in optimizer.state_shards() for tensor in shard.tensors.values())
    placements = [parameter.placement for parameter in make_parameters().values()]
    shapes = {where.name: where.global_shape for placed in placements for where in placed.rectangles}
    assert state_bytes(shapes, MUON) == held
    assert state_bytes(shapes, OptimConfig()) == 12 * sum(parameter.numel() for parameter in make_parameters().values())


def test_planned_state_is_smaller_by_a_moment_of_the_matrices() -> None:
    adamw, muon = (
        stage_memory(MODEL, STAGE, RankSettings(dp=2, tp=2, seq_length=64, optim=optim))["optimizer"]
        for optim in (OptimConfig(), MUON)
    )
    matrices = matrices_of(logical_shapes(MODEL), MUON)
    elements = sum(rows * columns for rows, columns in matrices.values())
    assert adamw - muon == 4 * elements / 2 / 2
    assert MuonShare.of(MODEL, [STAGE], RankSettings(tp=2, optim=MUON)).elements == elements // 2


def test_flops_are_those_of_every_matrix_once_and_a_part_of_a_step_at_12b() -> None:
    """At the paper's 6 M tokens a step; by hand for the MLPs, which are half of them."""
    config = load("nemotron_h_12b")
    per_block = 5 * 2 * (2 * 5120**2 * 20480 + 5120**3)
    total = whole_flops(config, OptimConfig(algorithm=Algorithm.muon))
    assert total > 2 * config.blocks.count("-") * per_block
    assert whole_flops(config, OptimConfig()) == 0
    step = count_flops(config, 8192).training * 768 * 8192
    assert total / step == pytest.approx(SHARE_AT_12B, rel=0.01), "docs/optimizers.md"


def test_a_rank_sends_no_more_than_planned_and_every_element_once_each_way() -> None:
    parameters = {f"m{number}": tensor for number, tensor in enumerate((torch.zeros(96, 64), torch.zeros(33, 40)))}
    named = [(name, LogicalParameter.whole(name, data)) for name, data in parameters.items()]
    total, replicas = sum(data.numel() for data in parameters.values()), 3
    group = DrawnGroup("dp_cp", tuple(range(replicas)), 0)
    buckets = make_buckets(
        named,
        group,
        bucket_numel=1024,
        sum_replicated_over_tp=False,
        as_matrix=lambda parameter: is_muons(parameter, MUON),
    )
    alone = ParallelMesh.single_process().tp
    ranks = [
        MatrixExchange(buckets, replace(group, rank=rank), alone, replace(group, rank=rank)) for rank in range(replicas)
    ]
    to_owners = [sum(one.elements_to_owners().values()) for one in ranks]
    to_holders = [sum(one.elements_to_holders().values()) for one in ranks]
    assert sum(to_owners) == sum(to_holders) == total
    largest = max(data.numel() for data in parameters.values())
    for rank, one in enumerate(ranks):
        sent = sum(count for peer, count in one.elements_to_owners().items() if peer != rank)
        sent += sum(count for peer, count in one.elements_to_holders().items() if peer != rank)
        own = -(-total // replicas) + 128  # parts end on multiples of 64 elements
        assert 0 < sent <= own + largest


def test_traffic_has_an_axis_for_matrices_only_with_muon() -> None:
    settings = RankSettings(dp=4, tp=2, optim=MUON)
    share = MuonShare.of(MODEL, [STAGE], settings)
    assert bytes_sent(MODEL, [STAGE], settings)["matrices"] == 2 * (share.elements / 4 + share.largest)
    assert bytes_sent(MODEL, [STAGE], replace(settings, dp=1, tp=1))["matrices"] == 0.0
    assert "matrices" not in bytes_sent(MODEL, [STAGE], replace(settings, optim=OptimConfig()))
