"""What is told of a run by pickled objects goes to who needs it: no rank receives one from every rank of the world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_fp4.checkpoint.outcome import NotSaved
from megatron_fp4.checkpoint.proposal import SaveAgreement, SaveProposal, exchange_proposals
from megatron_fp4.cli import preflight
from megatron_fp4.comm.agree import agreed
from megatron_fp4.comm.bootstrap import Process
from megatron_fp4.comm.collectives import tell_first
from megatron_fp4.comm.launch import Launch
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.optim import OptimConfig, Zero1Optimizer
from megatron_fp4.precision.statistics import QuantizationStats
from megatron_fp4.proofs.checks import CheckResult
from megatron_fp4.proofs.machine import check_links
from megatron_fp4.train.telemetry import quantization
from megatron_fp4.train.telemetry.norms import norms_by_tensor
from tests.helpers.distributed import mesh_for, run_distributed
from tests.optim.layouts import NUM_PARTS, LocalModel

LAYOUTS = ({"pp": 2, "dp": 2}, {"tp": 2, "dp": 2}, {"dp": 4, "ep": 2})
STATS = QuantizationStats(20.0, 0.01, 0.0, 0.0, (), 1.0)


def sizes_of_groups(act: Callable[[], Any]) -> tuple[Any, list[int]]:
    """What `act` returns, and from how many ranks this one received objects."""
    sizes: list[int] = []

    def counted(name: str) -> Callable[..., None]:
        real = getattr(dist, name)

        def call(*args: Any, **settings: Any) -> None:
            sizes.append(dist.get_world_size(settings["group"]))
            real(*args, **settings)

        return call

    names = ("all_gather_object", "gather_object")
    with mock.patch.multiple(dist, **{name: counted(name) for name in names}):
        return act(), sizes


def refuse(rank: int) -> None:
    if rank in (1, 3):
        raise ValueError(f"bad news {rank}")


def proposal_of(rank: int) -> SaveProposal:
    """Rank 3 knows the cause of what all have met, rank 2 refuses, rank 1 has another layout."""
    previous = NotSaved("disk full" if rank == 3 else "given up", is_consequence=rank != 3)
    return SaveProposal(previous, "no shape" if rank == 2 else None, replan=rank == 1)


def norms_of(mesh: ParallelMesh, *, spoiled: bool = False) -> dict[str, dict[str, float]]:
    model = LocalModel.build(mesh, torch.float32)
    optimizer = Zero1Optimizer(model.parameters.items(), OptimConfig(), mesh, True)
    for part in range(mesh.dp_cp.rank, NUM_PARTS, mesh.dp_cp.size):
        model.backward(0, part, True)
    if spoiled and "1.up.weight" in model.parameters and mesh.dp.rank == mesh.tp.rank == 0:
        model.parameters["1.up.weight"].main_grad[3, 5] = float("nan")  # type: ignore[index]
    norm = optimizer.finish_grads()
    if spoiled:
        return {name: {} for name in optimizer.step(norm, lr=0.1, max_norm=1.0).nonfinite}
    return norms_by_tensor(optimizer)


def tell_in_all_layouts(rank: int, world_size: int) -> list[dict[str, Any]]:
    return [tell(rank, mesh_for(rank, world_size, experts=True, **sizes)) for sizes in LAYOUTS]


def tell(rank: int, mesh: ParallelMesh) -> dict[str, Any]:
    report = {f"blocks.{mesh.pp.rank}.mlp.up/fprop.x": STATS, f"head{rank}/fprop.x": STATS}

    def error() -> str:
        with pytest.raises(ValueError, match="rank") as caught:
            agreed(lambda: refuse(rank), mesh.world)
        return str(caught.value)

    process = Process(Launch(rank, 4, rank, 4), mesh.world, torch.device("cpu"))
    acts: dict[str, Callable[[], Any]] = {
        "norms": lambda: norms_of(mesh),
        "nonfinite": lambda: list(norms_of(mesh, spoiled=True)),
        "statistics": lambda: sorted(quantization._gather(report, mesh)),
        "agreed": lambda: agreed(lambda: rank, mesh.world),
        "errors": error,
        "save": lambda: exchange_proposals(proposal_of(rank), mesh.world),
        "preflight": lambda: preflight._failed_on_any([CheckResult("disk", rank != 2, f"disk of {rank}")], mesh.world),
        "clocks": lambda: check_links(process)[0].ok,
        "first": lambda: tell_first(str(rank) if rank else "", mesh.world, 2),
    }
    return {name: sizes_of_groups(act) for name, act in acts.items()}


@pytest.fixture(scope="module")
def answers() -> list[list[dict[str, Any]]]:
    return run_distributed(tell_in_all_layouts, 4)


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_no_rank_hears_objects_of_the_whole_world(number: int, answers: list[list[dict[str, Any]]]) -> None:
    expected, sizes = norms_of(ParallelMesh.single_process()), LAYOUTS[number]
    stages = [0, 2] if "pp" in sizes else [0]
    for rank, acts in enumerate(of_rank[number] for of_rank in answers):
        results = {name: result for name, (result, _) in acts.items()}
        assert results["norms"].keys() == expected.keys()
        for name, of_tensor in expected.items():
            assert results["norms"][name] == pytest.approx(of_tensor, rel=1e-12), f"rank {rank}: {name}"
        assert results["nonfinite"] == ["1.up.weight"]
        names = sorted(f"head{first}/fprop.x" for first in stages)
        names = sorted([*names, *(f"blocks.{stage}.mlp.up/fprop.x" for stage in range(len(stages)))])
        assert results["statistics"] == (names if rank == 0 else []), "only the main rank writes them"
        assert results["agreed"] == rank
        assert results["errors"] == "rank 1: bad news 1; rank 3: bad news 3"
        assert results["first"] == {1: "1", 2: "2"}
        assert results["save"] == SaveAgreement("rank 3: disk full", "rank 2: no shape", True, None)
        assert results["preflight"] == [(2, CheckResult("disk", False, "disk of 2"))]
        assert results["clocks"]
        for name, (_, group_sizes) in acts.items():
            most = max(sizes.get("pp", 1), sizes.get("ep", 1))
            assert all(size <= most for size in group_sizes), f"{name}: objects of {group_sizes} ranks"
