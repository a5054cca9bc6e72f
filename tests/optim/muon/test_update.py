"""A step of Muon is torch.optim.Muon's; who gets which parameter; owners have even loads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from megatron_fp4.comm.collectives import even_counts
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh, build_stage_group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle
from megatron_fp4.optim import Algorithm, OptimConfig, Zero1Optimizer
from megatron_fp4.optim.muon import update as update_module
from megatron_fp4.optim.muon.choice import check_patterns, choice_table, is_muons
from megatron_fp4.optim.muon.config import SIMPLE, MuonConfig, NewtonSchulz, UpdateScale
from megatron_fp4.optim.muon.exchange import choose_owners
from megatron_fp4.optim.muon.newton_schulz import SMALLEST_NORM
from tests.helpers.distributed import mesh_for, run_distributed
from tests.optim.layouts import packed, unpacked
from tests.optim.synthetic import contribute, exact_gradient, make_parameters

BY_TORCH = {UpdateScale.shape: "original", UpdateScale.match_adamw_rms: "match_rms_adamw"}


def config_of(**muon: object) -> OptimConfig:
    return OptimConfig(algorithm=Algorithm.muon, muon=MuonConfig(**muon), bucket_mib=0.005)  # type: ignore[arg-type]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", BY_TORCH)
def test_a_step_is_torchs(nesterov: bool, scale: UpdateScale, monkeypatch: pytest.MonkeyPatch) -> None:
    by_torch = partial(_zeropower_via_newtonschulz, ns_coefficients=SIMPLE, ns_steps=5, eps=SMALLEST_NORM)
    monkeypatch.setattr(update_module, "orthogonalize", lambda x, triples, dtype: by_torch(x))
    config = config_of(nesterov=nesterov, scale=scale, newton_schulz=NewtonSchulz.simple, momentum=0.9)
    parameters = make_parameters()
    names = [name for name, parameter in parameters.items() if is_muons(parameter, config)]
    assert names == ["blocks.0.attention.qkv.weight", "blocks.0.mlp.weight", "blocks.1.odd.weight"]
    whole = {where.name: rows for name in names for rows, where in _segments(parameters[name])}
    expected = {name: torch.nn.Parameter(rows.clone()) for name, rows in whole.items()}
    torchs = torch.optim.Muon(
        expected.values(), lr=1e-2, momentum=0.9, nesterov=nesterov, weight_decay=0.1, adjust_lr_fn=BY_TORCH[scale]
    )
    optimizer = Zero1Optimizer(parameters.items(), config, ParallelMesh.single_process(), sequence_parallel=False)
    for step in range(4):
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            contribute(parameter, exact_gradient(name, tuple(parameter.shape), step, 0))
        for name in names:
            for rows, where in _segments(parameters[name], gradients=True):
                expected[where.name].grad = rows.clone()
        optimizer.step(optimizer.finish_grads(), lr=1e-2, max_norm=0.0)
        torchs.step()
        for name in names:
            for rows, where in _segments(parameters[name]):
                assert torch.equal(rows, expected[where.name].detach()), f"step {step}: {where.name}"


def test_cautious_decay_spares_weights_that_the_update_moves_away_from_0() -> None:
    """Two steps from the same state, with and without decay, differ where update and weight agree, and by the decay."""
    results = []
    for decay, cautious in ((0.0, False), (0.5, True), (0.5, False)):
        config = replace(config_of(), weight_decay=decay, cautious_decay=cautious)
        parameters = make_parameters()
        optimizer = Zero1Optimizer(parameters.items(), config, ParallelMesh.single_process(), sequence_parallel=False)
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            contribute(parameter, exact_gradient(name, tuple(parameter.shape), 0, 0))
        optimizer.step(optimizer.finish_grads(), lr=1e-2, max_norm=0.0)
        results.append(parameters)
    none, careful, everywhere = results
    for name, before in make_parameters().items():
        if before.dim() == 2:
            agree = (before - none[name]) * before >= 0
            expected = torch.where(agree, everywhere[name], none[name])
            torch.testing.assert_close(careful[name].detach(), expected.detach(), rtol=1e-6, atol=1e-8, msg=name)
            assert 0.2 < float(agree.float().mean()) < 0.8


def _segments(parameter: LogicalParameter, gradients: bool = False) -> list[tuple[torch.Tensor, Rectangle]]:
    rows = parameter.main_grad if gradients else parameter.detach()
    assert rows is not None
    return [(rows[local], where) for local, where in parameter.placement.pieces()]


def test_the_rest_is_adamws_at_its_own_rate() -> None:
    results = []
    for config, lr in ((config_of(adamw_lr=3e-3), 3e-4), (OptimConfig(bucket_mib=0.005), 3e-3)):
        parameters = make_parameters()
        optimizer = Zero1Optimizer(parameters.items(), config, ParallelMesh.single_process(), sequence_parallel=False)
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            contribute(parameter, exact_gradient(name, tuple(parameter.shape), 0, 0))
        optimizer.step(optimizer.finish_grads(), lr=lr, max_norm=0.0)
        results.append(parameters)
    muon, adamw = results
    for name in ("embedding.weight", "head.weight", "blocks.0.norm.weight", "blocks.1.conv.weight"):
        torch.testing.assert_close(muon[name], adamw[name], rtol=1e-6, atol=1e-9)
    assert not torch.equal(muon["blocks.0.mlp.weight"], adamw["blocks.0.mlp.weight"])


def test_state_has_one_moment_for_matrices_and_two_for_the_rest() -> None:
    optimizer = Zero1Optimizer(make_parameters().items(), config_of(), ParallelMesh.single_process(), False)
    kinds = {shard.name: sorted(shard.tensors) for shard in optimizer.state_shards()}
    assert kinds["blocks.0.attention.q.weight"] == kinds["blocks.0.mlp.weight"] == ["master", "momentum"]
    assert kinds["embedding.weight"] == kinds["blocks.0.norm.weight"] == ["exp_avg", "exp_avg_sq", "master"]


def test_a_fused_weight_is_not_cut_between_optimizers() -> None:
    parameter = make_parameters()["blocks.0.attention.qkv.weight"]
    with pytest.raises(ValueError, match=r"adamw_for names blocks\.0\.attention\.q\.weight, .*together with"):
        is_muons(parameter, config_of(adamw_for=("*.q.weight",)))
    assert not is_muons(parameter, config_of(adamw_for=("*.attention.*",)))


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'embeding\.\*' fits no weight of this model; they are called"):
        check_patterns(["embedding.weight", "head.weight"], config_of(adamw_for=("embeding.*",)))
    check_patterns(["up.weight"], config_of())


def test_the_table_says_who_and_why() -> None:
    placements = [parameter.placement for parameter in make_parameters().values()]
    shapes = {where.name: where.global_shape for placed in placements for where in placed.rectangles}
    assert choice_table(shapes, config_of()) == [
        "muon   a matrix                           blocks.*.attention.q.weight (1),"
        " blocks.*.attention.k.weight (1), blocks.*.attention.v.weight (1), blocks.*.mlp.weight (1),"
        " blocks.*.odd.weight (1)",
        "adamw  no matrix                          blocks.*.norm.weight (2), blocks.*.conv.weight (1)",
        "adamw  optim.muon.adamw_for: embedding.*  embedding.weight (1)",
        "adamw  optim.muon.adamw_for: head.*       head.weight (1)",
    ]


def test_a_matrix_without_weight_decay_is_adamws() -> None:
    placement = Placement((Rectangle.whole("blocks.0.x.weight", (4, 4)),), decay=False)
    assert not is_muons(LogicalParameter(torch.zeros(4, 4), placement), config_of())


UNEVEN = {"a.weight": (37, 12), "b.weight": (9, 16), "c.weight": (64, 8)}


def train_uneven(mesh: ParallelMesh) -> dict[str, tuple[tuple[slice, ...], torch.Tensor]]:
    """The parameters of this rank after two steps, where tensor-parallel ranks have uneven parts of a matrix."""
    parameters = {}
    for name, (rows, columns) in UNEVEN.items():
        counts = even_counts(rows, mesh.tp.size)
        first, count = sum(counts[: mesh.tp.rank]), counts[mesh.tp.rank]
        whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        where = Rectangle(name, (rows, columns), (first, 0), (count, columns))
        parameters[name] = LogicalParameter(whole[where.slices].clone(), Placement((where,)))
    config = replace(config_of(adamw_for=()), bucket_mib=0.0015)
    stage = build_stage_group(ParallelConfig(tp=mesh.tp.size), mesh)
    optimizer = Zero1Optimizer(parameters.items(), config, mesh, sequence_parallel=True, stage=stage)
    for step in range(2):
        optimizer.zero_grad()
        for name, parameter in parameters.items():
            (where,) = parameter.placement.rectangles
            for part in range(mesh.dp.rank, 2, mesh.dp.size):
                contribute(parameter, exact_gradient(name, UNEVEN[name], step, part)[where.slices])
        optimizer.step(optimizer.finish_grads(), lr=1e-2, max_norm=0.0)
    optimizer.wait_parameters()
    return {
        name: (tensor.placement.rectangles[0].slices, tensor.detach().clone()) for name, tensor in parameters.items()
    }


def uneven_layouts(rank: int, world_size: int) -> bytes:
    return packed([train_uneven(mesh_for(rank, world_size, tp=tp, dp=world_size // tp)) for tp in (2, 4)])


def test_ranks_with_uneven_shares_lay_buckets_out_differently() -> None:
    expected = {name: whole for name, (_, whole) in train_uneven(ParallelMesh.single_process()).items()}
    for rank, result in enumerate(run_distributed(uneven_layouts, 4)):
        for layout, of_rank in enumerate(unpacked(result)):
            for name, (slices, tensor) in of_rank.items():
                assert torch.equal(tensor, expected[name][slices]), f"rank {rank}, layout {layout}: {name}"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_owners_have_even_loads(num_ranks: int) -> None:
    block = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "up": (16384, 4096)}
    block["down"] = (4096, 16384)
    shapes = {f"blocks.{number}.{name}": shape for number in range(16) for name, shape in block.items()}
    owners = choose_owners(shapes, num_ranks)
    loads = [0] * num_ranks
    for name, rank in owners.items():
        rows, columns = shapes[name]
        loads[rank] += rows * columns * min(rows, columns)
    assert max(loads) <= 1.15 * sum(loads) / num_ranks
    assert owners == choose_owners(dict(reversed(shapes.items())), num_ranks), "depends on the order of the names"
