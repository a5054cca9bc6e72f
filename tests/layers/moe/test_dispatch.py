"""Rows reach experts on other ranks and come back: the same bits in the same order as on one rank, and what they cost.

Every rank has eight tokens of 32. A function of row, weight and expert stands for the experts; whatever is moved to a
wrong place, added twice or in another order shows in its results or gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import DrawnGroup, ParallelMesh, draw_mesh
from megatron_fp4.layers import lab
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.moe.dispatch import Arrivals, combine, dispatch
from megatron_fp4.layers.moe.router import Routes
from tests.helpers.distributed import mesh_for, run_distributed

T, D, K, E = 32, 6, 3, 8
CONFIG = MoeConfig(num_experts=E, top_k=K, ffn_hidden=16)
LAYOUTS = {
    "dp4 ep4": {"dp": 4, "ep": 4},
    "dp4 ep2": {"dp": 4, "ep": 2},
    "tp2 dp2 ep4": {"tp": 2, "dp": 2, "ep": 4},
    "tp2 dp2 ep2": {"tp": 2, "dp": 2, "ep": 2},
    "cp2 dp2 ep2": {"cp": 2, "dp": 2, "ep": 2},
}
ROUTINGS = ("spread", "all to one rank", "some dropped", "chunks")


@dataclass
class Outcome:
    """addresses: of this rank's tokens. segments: (expert, addresses, rows of x) in their order."""

    addresses: Tensor
    y_TD: Tensor
    dx_TD: Tensor
    dweight_Tk: Tensor
    segments: list[tuple[int, Tensor, Tensor]]
    sent_bytes: int
    sent_rows: int


def tokens_of(mesh: ParallelMesh) -> Tensor:
    """Of a microbatch, the rows of its tensor-parallel rank; context-parallel ones have its first and last quarter."""
    per_replica = T // mesh.dp.size
    microbatch = torch.arange(per_replica) + mesh.dp.rank * per_replica
    quarters = microbatch.chunk(2 * mesh.cp.size)
    own = torch.cat([quarters[mesh.cp.rank], quarters[-1 - mesh.cp.rank]]) if mesh.cp.size > 1 else microbatch
    return own.chunk(mesh.tp.size)[mesh.tp.rank]


def routes_of(routing: str, address_T: Tensor) -> Routes:
    generator = torch.Generator().manual_seed(5)
    scores = torch.rand(T, E, generator=generator)
    if routing == "all to one rank":
        scores[:, 2:] -= 1.0
        scores[:, 0] += 1.0
    experts = scores.topk(2 if routing == "all to one rank" else K).indices.sort(-1).values
    weights = torch.rand(experts.shape, generator=generator)
    kept = torch.rand(experts.shape, generator=generator) < 0.6 if routing == "some dropped" else None
    chosen = (weights[address_T].requires_grad_(), None if kept is None else kept[address_T])
    return Routes(experts[address_T], *chosen)


def act(arrivals: Arrivals, first_expert: int) -> Tensor:
    expert_R = arrivals.segments.experts(torch.device("cpu")) + first_expert
    return (arrivals.x_RD * arrivals.weight_R[:, None]).sin() * (1.0 + expert_R[:, None])


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """Bytes that this rank sends to others in all-to-alls."""
    sent: list[int] = []
    send = dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, received: list[int], counts: list[int], group: Any, **options: Any) -> Any:
        others = sum(counts) - counts[dist.get_rank(group)]
        sent.append(others * x[:1].nbytes if len(x) else 0)
        return send(out, x, received, counts, group=group, **options)

    with mock.patch.object(dist, "all_to_all_single", counted):
        yield sent


def move(mesh: ParallelMesh, routing: str, address_T: Tensor) -> Outcome:
    context = replace(lab(), tp=mesh.tp, cp=mesh.cp, tp_cp=mesh.tp_cp, ep=mesh.ep, edp=mesh.edp)
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(7))[address_T].requires_grad_()
    gradient_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(8))[address_T]
    routes = routes_of(routing, address_T)
    config = replace(CONFIG, segment_tokens=4 if routing == "chunks" else 0, top_k=routes.experts_Tk.shape[1])
    with counted_bytes() as sent:
        arrivals = dispatch(x_TD, routes, address_T, config, context)
        first = mesh.ep.rank * (E // mesh.ep.size)
        y_TD = combine(act(arrivals, first), arrivals)
        y_TD.backward(gradient_TD)
    parts = [
        (first + part.expert, arrivals.rows[part.rows], arrivals.x_RD[part.rows].detach())
        for part in arrivals.segments.parts
    ]
    exchange = arrivals.moves.exchange
    others = exchange.num_sent - exchange.sent[mesh.ep.rank]
    back = exchange.num_received - exchange.received[mesh.ep.rank]
    assert x_TD.grad is not None
    assert routes.weights_Tk.grad is not None
    outcome = Outcome(address_T, y_TD.detach(), x_TD.grad, routes.weights_Tk.grad, parts, sum(sent), others)
    if mesh.ep.size > 1:
        assert len(sent) == 5, "a count of rows, then one message each way, forward and backward"
        classes = E // mesh.ep.size * (T // mesh.dp.size // 4 if routing == "chunks" else 1)
        row = 4 * D
        expected = (mesh.ep.size - 1) * classes * 8 + others * (row + 4 + 8 + row) + back * (row + row + 4)
        assert outcome.sent_bytes == expected
    return outcome


def move_in_all_layouts(rank: int, world_size: int) -> dict[tuple[str, str], Outcome]:
    outcomes = {}
    for layout, sizes in LAYOUTS.items():
        mesh = mesh_for(rank, world_size, experts=True, **sizes)
        for routing in ROUTINGS:
            outcomes[layout, routing] = move(mesh, routing, tokens_of(mesh))
    return outcomes


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str], Outcome]]:
    return run_distributed(move_in_all_layouts, 4)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_go_and_come_back_as_on_one_rank(
    layout: str, routing: str, ranks: list[dict[tuple[str, str], Outcome]]
) -> None:
    outcomes = [of_rank[layout, routing] for of_rank in ranks]
    num_microbatches = LAYOUTS[layout]["dp"]
    alone = [
        move(ParallelMesh.single_process(), routing, microbatch)
        for microbatch in torch.arange(T).chunk(num_microbatches)
    ]
    for name in ("y_TD", "dx_TD", "dweight_Tk"):
        expected = torch.cat([getattr(outcome, name) for outcome in alone])
        for rank, outcome in enumerate(outcomes):
            assert torch.equal(getattr(outcome, name), expected[outcome.addresses]), f"rank {rank}: {name}"
    if routing == "all to one rank":
        assert [bool(outcome.segments) for outcome in outcomes].count(False) >= 2, "no rank was without a row"
    seen = [part for outcome in outcomes for part in outcome.segments]
    wanted = [part for outcome in alone for part in outcome.segments]
    assert len(seen) == len(wanted)
    for part, right in zip(sorted(seen, key=_place), sorted(wanted, key=_place), strict=True):
        assert part[0] == right[0]
        assert torch.equal(part[1], right[1]), f"expert {part[0]}: {part[1].tolist()}, not {right[1].tolist()}"
        assert torch.equal(part[2], right[2])


def _place(part: tuple[int, Tensor, Tensor]) -> tuple[int, int]:
    return part[0], int(part[1][0])


def test_segments_of_a_rank_are_in_the_order_of_expert_and_source(
    ranks: list[dict[tuple[str, str], Outcome]],
) -> None:
    for of_rank in ranks:
        for outcome in of_rank.values():
            order = [_place(part) for part in outcome.segments]
            assert order == sorted(order)


def test_without_data_rows_are_spread_evenly() -> None:
    """What a plan counts memory with: a rank of a layout that does not run, on the meta device."""
    mesh = draw_mesh(ParallelConfig(dp=4, ep=4), 4, rank=1)
    assert isinstance(mesh.ep, DrawnGroup)
    meta = torch.device("meta")
    context = replace(lab(), ep=mesh.ep, edp=mesh.edp, device=meta)
    x_TD = torch.empty(8, D, device=meta, requires_grad=True)
    experts = torch.empty(8, K, dtype=torch.int64, device=meta)
    routes = Routes(experts, torch.empty(8, K, device=meta, requires_grad=True))
    arrivals = dispatch(x_TD, routes, torch.empty(8, dtype=torch.int64, device=meta), CONFIG, context)
    assert arrivals.x_RD.shape == (8 * K, D)
    assert [part.num_rows for part in arrivals.segments.parts] == [3] * 8, "of two experts, from each of four ranks"
    combine(arrivals.x_RD * 2, arrivals).sum().backward()
    assert x_TD.grad is not None
