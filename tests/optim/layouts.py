"""A synthetic model cut for any layout. Its gradients sum exactly in FP32, so every layout must give the same bits."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import ParallelMesh, build_stage_group
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.comm.rect import Placement, Rectangle, Shard
from megatron_fp4.optim import OptimConfig, Zero1Optimizer
from tests.optim.synthetic import contribute, exact_gradient, hash_of

# Local sizes are multiples of 16 elements at tp 4: torch's kernel computes what is left over in another precision.
NUM_PARTS = 12  # contributions to every gradient: microbatches of all data-parallel ranks together

NUM_STEPS = 3


@dataclass(frozen=True)
class Logical:
    """A local parameter before sharding: logical segments, each cut along `dim` over tp, or None = replicated.

    experts: the segments are divided over ep instead.
    """

    name: str
    segments: dict[str, tuple[int, ...]]
    dim: int | None
    stage: int
    experts: bool = False

    def segments_on(self, mesh: ParallelMesh) -> dict[str, tuple[int, ...]]:
        names = list(self.segments)
        share = len(names) // mesh.ep.size if self.experts else len(names)
        first = mesh.ep.rank * share if self.experts else 0
        return {name: self.segments[name] for name in names[first : first + share]}


MODEL = (
    Logical("embedding.weight", {"embedding.weight": (128, 24)}, 0, 0),
    Logical("0.qkv.weight", {"0.q.weight": (48, 64), "0.k.weight": (24, 64), "0.v.weight": (24, 64)}, 0, 0),
    Logical("0.norm.weight", {"0.norm.weight": (333,)}, None, 0),
    Logical("0.down.weight", {"0.down.weight": (33, 256)}, 1, 0),
    Logical("1.conv.weight", {"1.conv.weight": (48, 1, 4)}, 0, 1),
    Logical("1.experts.weight", {f"1.experts.{e}.weight": (12, 16) for e in range(4)}, None, 1, experts=True),
    Logical("1.small.weight", {"1.small.weight": (7, 5)}, None, 1),
    Logical("1.norm.weight", {"1.norm.weight": (9,)}, None, 1),
    Logical("1.up.weight", {"1.up.weight": (128, 33)}, 0, 1),
)


def cut(whole: Tensor, dim: int | None, mesh: ParallelMesh) -> Tensor:
    """My tensor-parallel part of a logical tensor."""
    return whole if dim is None else whole.chunk(mesh.tp.size, dim)[mesh.tp.rank]


def initial(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash_of(name)))


def make_local(logical: Logical, mesh: ParallelMesh, dtype: torch.dtype, writes: bool) -> LogicalParameter:
    pieces, rectangles = [], []
    for name, shape in logical.segments_on(mesh).items():
        piece = cut(initial(name, shape), logical.dim, mesh)
        offset = [0] * len(shape)
        if logical.dim is not None:
            offset[logical.dim] = mesh.tp.rank * piece.shape[logical.dim]
        rectangles.append(Rectangle(name, shape, tuple(offset), tuple(piece.shape)))
        pieces.append(piece)
    data, replicated = torch.cat(pieces).to(dtype), logical.dim is None and not logical.experts
    flags = {"tp_replicated": replicated, "of_experts": logical.experts}
    placement = Placement(tuple(rectangles), decay=data.dim() > 1, writes=writes, **flags)
    return LogicalParameter(data, placement)


@dataclass
class LocalModel:
    """The parameters of one rank; the last stage has a copy of the embedding where there are two stages."""

    mesh: ParallelMesh
    parameters: dict[str, LogicalParameter] = field(default_factory=dict)

    @staticmethod
    def build(mesh: ParallelMesh, dtype: torch.dtype) -> LocalModel:
        model = LocalModel(mesh)
        for logical in MODEL:
            if logical.stage % mesh.pp.size == mesh.pp.rank:
                model.parameters[logical.name] = make_local(logical, mesh, dtype, writes=True)
        if mesh.pp.size > 1:
            if mesh.pp.rank:
                model.parameters["embedding.weight"] = make_local(MODEL[0], mesh, dtype, writes=False)
            model.parameters["embedding.weight"].tied_group = mesh.pp
        return model

    def backward(self, step: int, part: int, sequence_parallel: bool) -> None:
        """Contribute microbatch `part` of the global batch, or this rank's share of it."""
        mesh = self.mesh
        for logical in MODEL:
            parameter = self.parameters.get(logical.name)
            if parameter is None:
                continue
            if logical.experts:
                self._contribute_to_experts(logical, parameter, step, part)
                continue
            if logical.dim is None and sequence_parallel and part % mesh.tp.size != mesh.tp.rank:
                continue  # another tensor-parallel rank saw these tokens
            if logical.name == "embedding.weight" and mesh.pp.size > 1 and part % 2 != mesh.pp.rank:
                continue  # the other use of the tied weight
            gradients = [
                cut(exact_gradient(name, shape, step, part), logical.dim, mesh)
                for name, shape in logical.segments.items()
            ]
            contribute(parameter, torch.cat(gradients))

    def _contribute_to_experts(self, logical: Logical, parameter: LogicalParameter, step: int, part: int) -> None:
        """From the tokens of every rank that shares the experts; of tensor-parallel ones, one has those of a part."""
        mesh = self.mesh
        total = torch.zeros(parameter.shape)
        for member in mesh.ep.ranks:
            replica, tp_rank = divmod(member % (mesh.tp.size * mesh.dp_cp.size), mesh.tp.size)
            theirs = part - mesh.dp_cp.rank + replica
            if theirs % mesh.tp.size == tp_rank:
                gradients = [exact_gradient(name, s, step, theirs) for name, s in logical.segments_on(mesh).items()]
                total += torch.cat(gradients)
        contribute(parameter, total)


@dataclass
class Outcome:
    """What one rank saw: gradient norms, owned rectangles, and the parameters that it holds."""

    norms: list[float]
    shards: list[Shard]
    parameters: dict[str, Tensor]


def train(
    mesh: ParallelMesh,
    config: OptimConfig,
    *,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = True,
    num_steps: int = NUM_STEPS,
    max_norm: float = 1.0,
) -> Outcome:
    """Train on the same global gradients at any layout."""
    model = LocalModel.build(mesh, dtype)
    stage = build_stage_group(ParallelConfig(tp=mesh.tp.size, cp=mesh.cp.size, pp=mesh.pp.size), mesh)
    optimizer = Zero1Optimizer(model.parameters.items(), config, mesh, sequence_parallel, stage=stage)
    norms = []
    local_parts = range(mesh.dp_cp.rank, NUM_PARTS, mesh.dp_cp.size)
    for step in range(num_steps):
        optimizer.zero_grad()
        for part in local_parts:
            if part == local_parts[-1]:
                optimizer.begin_last_microbatch()
            model.backward(step, part, sequence_parallel)
        norm = optimizer.finish_grads()
        norms.append(optimizer.step(norm, lr=1e-2 / (step + 1), max_norm=max_norm).grad_norm)
    shards = [
        Shard(shard.where, {kind: shard.read(kind).clone() for kind in shard.tensors}, shard.writes)
        for shard in optimizer.state_shards()
    ]
    parameters = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
    return Outcome(norms, shards, parameters)


def packed(value: Any) -> bytes:
    """A rank's result as bytes: tensors would travel as file descriptors, which end with the process that sent them."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(value: bytes) -> Any:
    return torch.load(io.BytesIO(value), weights_only=False)


def assemble(outcomes: list[Outcome]) -> dict[str, dict[str, Tensor]]:
    """{kind: {logical name: tensor}} from the shards that are written; each element must be written exactly once."""
    whole: dict[str, dict[str, Tensor]] = {}
    written: dict[str, Tensor] = {}
    for outcome in outcomes:
        for shard in outcome.shards:
            if not shard.writes:
                continue
            name, shape, place = shard.name, shard.where.global_shape, shard.where.slices
            written.setdefault(name, torch.zeros(shape, dtype=torch.int64))[place] += 1
            for kind, tensor in shard.tensors.items():
                whole.setdefault(kind, {}).setdefault(name, torch.full(shape, float("nan")))[place] = tensor
    for name, count in written.items():
        assert bool((count == 1).all()), f"{name}: some elements are saved {count.unique().tolist()} times"
    return whole
