"""No layout changes a bit: dp 1 to 4, tensor parallel with and without sequence parallel, stages with a tied weight.

The gradients sum exactly in FP32, so masters, moments and norms must be those of one process running torch's AdamW.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.optim import Algorithm, OptimConfig, Overlap, Zero1Optimizer
from megatron_fp4.optim import bucket_comm as bucket_comm_module
from megatron_fp4.optim.clip import clip_factor, global_norm
from megatron_fp4.optim.config import MainGradFormat
from megatron_fp4.optim.kept.config import MasterFormat, MomentFormat, MomentsConfig
from tests.helpers.distributed import mesh_for, run_distributed
from tests.optim.layouts import (
    MODEL,
    NUM_PARTS,
    NUM_STEPS,
    LocalModel,
    Outcome,
    assemble,
    initial,
    packed,
    train,
    unpacked,
)
from tests.optim.synthetic import exact_gradient


def moments(name: str) -> MomentsConfig:
    """All of one format."""
    return MomentsConfig(MomentFormat[name], MomentFormat[name], MomentFormat[name])


SMALL = OptimConfig(bucket_mib=0.01, overlap_reduce=Overlap.always)
LARGE = OptimConfig(bucket_mib=1.0)
BF16_SUMS = replace(SMALL, main_grads=MainGradFormat.bf16)
MUON = OptimConfig(bucket_mib=0.01, algorithm=Algorithm.muon)
AS_FP32_MASTERS = {"remainder": "bf16", "muon, remainder": "muon, bf16"}
SIZES = {
    "dp2": (2, {"dp": 2}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp3": (3, {"dp": 3}),
    "dp4": (4, {"dp": 4}),
    "cp2 dp2": (4, {"cp": 2, "dp": 2}),
    "tp4": (4, {"tp": 4}),
    "tp2 dp2": (4, {"tp": 2, "dp": 2}),
    "pp2 dp2": (4, {"pp": 2, "dp": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "dp2 ep2": (2, {"dp": 2, "ep": 2}),
    "tp2 ep2": (2, {"tp": 2, "ep": 2}),
    "dp4 ep2": (4, {"dp": 4, "ep": 2}),
    "dp4 ep4": (4, {"dp": 4, "ep": 4}),
    "tp2 dp2 ep4": (4, {"tp": 2, "dp": 2, "ep": 4}),
    "pp2 dp2 ep2": (4, {"pp": 2, "dp": 2, "ep": 2}),
}
VARIANTS = {
    "small buckets, overlapped": {"config": SMALL},
    "one bucket": {"config": LARGE},
    "no sequence parallel": {"config": LARGE, "sequence_parallel": False},
    "bf16": {"config": SMALL, "dtype": torch.bfloat16},
    "muon": {"config": MUON},
    "cautious": {"config": replace(SMALL, cautious_decay=True)},
    "muon, cautious": {"config": replace(MUON, cautious_decay=True), "dtype": torch.bfloat16},
    "muon, bf16": {"config": MUON, "dtype": torch.bfloat16},
    "remainder": {"config": replace(SMALL, master=MasterFormat.remainder), "dtype": torch.bfloat16},
    "muon, remainder": {"config": replace(MUON, master=MasterFormat.remainder), "dtype": torch.bfloat16},
    "bf16 moments": {"config": replace(SMALL, moments=moments("bf16")), "dtype": torch.bfloat16},
    "int8 moments": {"config": replace(SMALL, moments=moments("int8")), "dtype": torch.bfloat16},
    "muon, fp8 moments": {
        "config": replace(MUON, moments=moments("fp8"), master=MasterFormat.remainder),
        "dtype": torch.bfloat16,
    },
}


def wrong_bf16_sums(mesh: ParallelMesh) -> list[str]:
    """Logical tensors whose sum is not the FP32 sum, in rank order, of what each replica has summed in BF16."""
    model = LocalModel.build(mesh, torch.bfloat16)
    optimizer = Zero1Optimizer(model.parameters.items(), BF16_SUMS, mesh, True)
    optimizer.zero_grad()
    for part in range(mesh.dp_cp.rank, NUM_PARTS, mesh.dp_cp.size):
        model.backward(0, part, True)
    optimizer.finish_grads()
    wrong = []
    for shard in optimizer.grad_shards():
        if mesh.dp_cp.size == 1 or "up" not in shard.name:  # this one every rank has by itself, whatever the layout
            continue
        total = torch.zeros(shard.where.global_shape)
        for replica in range(mesh.dp_cp.size):
            own = torch.zeros_like(total, dtype=torch.bfloat16)
            for part in range(replica, NUM_PARTS, mesh.dp_cp.size):
                own += exact_gradient(shard.name, shard.where.global_shape, 0, part)
            total += own
        if not torch.equal(shard.read("grad"), total[shard.where.slices]):
            wrong.append(shard.name)
    return wrong


def all_layouts(rank: int, world_size: int) -> bytes:
    outcomes = {}
    for layout, (size, axes) in SIZES.items():
        if size == world_size:
            mesh = mesh_for(rank, world_size, experts=True, **axes)
            for variant, options in VARIANTS.items():
                outcomes[layout, variant] = train(mesh, **options)  # type: ignore[arg-type]
            native = bucket_comm_module.uses_gloo
            bucket_comm_module.uses_gloo = lambda group: False  # the collectives that NCCL gets
            outcomes[layout, "native collectives"] = train(mesh, SMALL)
            options = {"dtype": torch.bfloat16, "max_norm": 0.0}
            outcomes[layout, "bf16 sums"] = train(mesh, BF16_SUMS, **options)  # type: ignore[arg-type]
            bucket_comm_module.uses_gloo = native
            others = [BF16_SUMS, replace(BF16_SUMS, overlap_reduce=Overlap.never)]
            narrow = [outcomes[layout, "bf16 sums"], *(train(mesh, other, **options) for other in others)]  # type: ignore[arg-type]
            assert all(packed(narrow[0]) == packed(other) for other in narrow[1:]), (
                "sums of BF16 depend on how they travel"
            )
            assert not wrong_bf16_sums(mesh), wrong_bf16_sums(mesh)
            if "pp" in axes:
                outcomes[layout, "20 steps"] = train(mesh, SMALL, dtype=torch.bfloat16, num_steps=20)
    return packed(outcomes)


@pytest.fixture(scope="module")
def worlds() -> dict[int, list[dict[tuple[str, str], Outcome]]]:
    return {size: [unpacked(result) for result in run_distributed(all_layouts, size)] for size in (2, 3, 4)}


@pytest.fixture(scope="module")
def one_process() -> dict[str, Outcome]:
    """By variant."""
    mesh = ParallelMesh.single_process()
    adamw = train(mesh, SMALL)
    as_adamw = ("small buckets, overlapped", "one bucket", "no sequence parallel", "native collectives")
    own = {variant: train(mesh, **VARIANTS[variant]) for variant in VARIANTS if variant not in as_adamw}  # type: ignore[arg-type]
    own["bf16, no clip"] = train(mesh, SMALL, dtype=torch.bfloat16, max_norm=0.0)
    return {**dict.fromkeys(as_adamw, adamw), **own}


def torch_adamw() -> tuple[list[float], dict[str, Tensor]]:
    """Norms and final weights of `torch.optim.AdamW` on the summed gradients."""
    shapes = {name: shape for logical in MODEL for name, shape in logical.segments.items()}
    weights = {name: torch.nn.Parameter(initial(name, shape)) for name, shape in shapes.items()}
    groups = [
        {"params": [w for w in weights.values() if (w.dim() > 1) is decays], "weight_decay": decay}
        for decays, decay in ((True, SMALL.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(SMALL.beta1, SMALL.beta2), eps=SMALL.eps, fused=True)
    norms = []
    for step in range(NUM_STEPS):
        for name, weight in weights.items():
            parts = [exact_gradient(name, shapes[name], step, part) for part in range(NUM_PARTS)]
            weight.grad = torch.stack(parts).sum(0)
        gradients = [w.grad for w in weights.values() if w.grad is not None]
        norms.append(global_norm(gradients, ParallelMesh.single_process().world, torch.device("cpu")))
        for gradient in gradients:
            gradient.mul_(clip_factor(norms[-1], 1.0))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
    return norms, {name: weight.detach() for name, weight in weights.items()}


def test_one_process_is_torch_adamw(one_process: dict[str, Outcome]) -> None:
    norms, weights = torch_adamw()
    assert one_process["one bucket"].norms == norms
    masters = assemble([one_process["one bucket"]])["master"]
    for name, weight in weights.items():
        assert torch.equal(masters[name], weight), f"{name} differs from torch.optim.AdamW"


@pytest.mark.parametrize("variant", [*VARIANTS, "native collectives"])
@pytest.mark.parametrize("layout", SIZES)
def test_layout_changes_no_bit(
    layout: str,
    variant: str,
    worlds: dict[int, list[dict[tuple[str, str], Outcome]]],
    one_process: dict[str, Outcome],
) -> None:
    reference = one_process[variant]
    outcomes = [rank[layout, variant] for rank in worlds[SIZES[layout][0]]]
    for rank, outcome in enumerate(outcomes):
        assert outcome.norms == reference.norms, f"rank {rank}: a gradient is counted twice, not summed, or left out"
    actual, expected = assemble(outcomes), assemble([reference])
    for kind, tensors in expected.items():
        assert actual[kind].keys() == tensors.keys(), f"{kind}: parameters without state"
        for name, tensor in tensors.items():
            assert torch.equal(actual[kind][name], tensor), f"{kind}/{name} depends on the layout"


@pytest.mark.parametrize(("compact", "full"), AS_FP32_MASTERS.items())
def test_remainders_are_fp32_masters(compact: str, full: str, one_process: dict[str, Outcome]) -> None:
    ours, theirs = one_process[compact], one_process[full]
    assert ours.norms == theirs.norms
    for kind, tensors in assemble([theirs]).items():
        for name, tensor in tensors.items():
            assert torch.equal(assemble([ours])[kind][name], tensor), f"{kind}/{name} differs from FP32 masters"
    for name, parameter in theirs.parameters.items():
        assert torch.equal(ours.parameters[name], parameter), f"{name} is rounded otherwise than an FP32 master"


@pytest.mark.parametrize("layout", ["dp2", "dp3", "dp4", "cp2 dp2"])
def test_parameters_are_gathered_on_every_rank(
    layout: str,
    worlds: dict[int, list[dict[tuple[str, str], Outcome]]],
    one_process: dict[str, Outcome],
) -> None:
    for variant in ("one bucket", "bf16", "muon, bf16", "remainder", "muon, remainder", "muon, fp8 moments"):
        for rank, outcomes in enumerate(worlds[SIZES[layout][0]]):
            for name, parameter in one_process[variant].parameters.items():
                gathered = outcomes[layout, variant].parameters[name]
                assert torch.equal(gathered, parameter), f"rank {rank}, {variant}: {name} is stale or shifted"


@pytest.mark.parametrize("layout", ["pp2", "pp2 dp2", "tp2 pp2"])
def test_tied_copies_stay_bit_equal(layout: str, worlds: dict[int, list[dict[tuple[str, str], Outcome]]]) -> None:
    outcomes = [rank[layout, "20 steps"].parameters["embedding.weight"] for rank in worlds[SIZES[layout][0]]]
    half = len(outcomes) // 2  # pp is the outermost axis
    for first, last in zip(outcomes[:half], outcomes[half:], strict=True):
        assert torch.equal(first, last), "the stages' copies of the tied embedding drift apart"


@pytest.mark.parametrize("layout", [name for name in SIZES if "ep" in name])
def test_an_expert_is_on_its_ranks_only_and_divided_over_them(
    layout: str, worlds: dict[int, list[dict[tuple[str, str], Outcome]]]
) -> None:
    world, axes = SIZES[layout]
    holders: dict[str, int] = {}
    for outcomes in worlds[world]:
        for name in {shard.name for shard in outcomes[layout, "one bucket"].shards if "experts" in shard.name}:
            holders[name] = holders.get(name, 0) + 1
    stage = world // axes.get("pp", 1)
    assert set(holders) == set(next(logical.segments for logical in MODEL if logical.experts))
    assert max(holders.values()) <= stage // axes["ep"], "optimizer state of an expert is on ranks that do not hold it"


@pytest.mark.parametrize(
    ("layouts", "apart"),
    [
        (("dp2", "tp2 dp2", "pp2 dp2", "dp2 ep2"), ("embedding", "experts")),
        (("dp4", "cp2 dp2", "dp4 ep2", "dp4 ep4"), ("experts",)),
    ],
)
def test_bf16_sums_depend_on_the_replicas_alone(
    layouts: tuple[str, ...], apart: tuple[str, ...], worlds: dict[int, list[dict[tuple[str, str], Outcome]]]
) -> None:
    """apart: a tied table, whose two uses are added on one rank or on two, and experts, which other ranks share."""
    first, *others = (
        assemble([rank[layout, "bf16 sums"] for rank in worlds[SIZES[layout][0]]])["master"] for layout in layouts
    )
    for other in others:
        for name in (name for name in first if not any(part in name for part in apart)):
            assert torch.equal(first[name], other[name]), f"{name} depends on more than the number of replicas"


def test_who_shares_with_nobody_sums_in_fp32(
    worlds: dict[int, list[dict[tuple[str, str], Outcome]]], one_process: dict[str, Outcome]
) -> None:
    masters = assemble([rank["tp2", "bf16 sums"] for rank in worlds[2]])["master"]
    divided = assemble([rank["dp2", "bf16 sums"] for rank in worlds[2]])["master"]
    for name, expected in assemble([one_process["bf16, no clip"]])["master"].items():
        assert "experts" in name or torch.equal(masters[name], expected), f"{name} was rounded where BF16 saves nothing"
        narrow = len(expected.shape) > 1 and "small" not in name
        assert torch.equal(divided[name], expected) is not narrow, f"{name}: vectors and replicated tensors stay FP32"


def test_cuts_inside_rows_were_exercised(worlds: dict[int, list[dict[tuple[str, str], Outcome]]]) -> None:
    parts = [shard.where for shard in worlds[3][0]["dp3", "one bucket"].shards]
    assert any(where.shape[1:] != where.global_shape[1:] for where in parts), "every piece is whole rows"
