"""Bytes that a stage keeps for its backward pass, and the most that it needs in passing, counted in its own layers.

Each kind of block (its letter, and the precision of its linears) is drawn on the meta device, on a mesh that is drawn
too, and run forward and backward once; what is alive is counted. A stage is a sum over its blocks, its embedding and
its head, so a model of a hundred blocks of five kinds takes five small runs, and another layout with the same local
sizes takes none.

Not here: weights, gradients and optimizer state (memory.py), and the allocator's fragmentation.
"""

from __future__ import annotations

import functools
import weakref
from collections import ChainMap
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.mesh import draw_mesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.layers.layer_context import LayerContext, Tokens
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.models.block import block_linears, last_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.decoder import Decoder, StageRange
from megatron_fp4.planning.settings import RankSettings
from megatron_fp4.planning.stand_ins import SizedBackend, cross_entropy_of, cuda_kernels, distance_of, use_fused_norms
from megatron_fp4.precision import StepClock, WgradPlan
from megatron_fp4.precision.spec import LinearPrecision

# Of a model of three blocks: the one in the middle; the embedding alone; final norm, multi-token prediction and head.
BLOCK = StageRange(1, 2, 3)
EMBEDDING = StageRange(0, 0, 3)
HEAD = StageRange(3, 3, 3)
TABLES = ("embedding.weight", "head.weight")
COPY = "mtp.embedding.weight"
FP32 = 4
BF16 = 2


class Moment(NamedTuple):
    """Part of a backward pass; at its end a gradient is complete. most: bytes at worst. elements: of the gradient."""

    most: int
    elements: int


@dataclass(frozen=True)
class Footprint:
    """Bytes of a part of a stage, for one microbatch.

    kept: after its forward pass. peak: at worst during forward and backward, what is kept included. deferred: after its
    backward pass, until weight gradients that a zero-bubble pipeline puts off are computed. tables: of what is kept,
    masks and angles that all its layers share, by their names; of a single part they are not counted as kept. moments:
    of its backward pass. last: as peak, in the last backward pass of a step, beside which sums of gradients arrive.
    arrived: those sums at its end.
    """

    kept: int
    peak: int
    deferred: int
    tables: Mapping[Hashable, int]
    moments: tuple[Moment, ...] = ()
    last: int = 0
    arrived: int = 0


class LiveBytes(TorchDispatchMode):
    """`now` and `peak`: bytes of the storages that were made under this mode and are still alive, on any device.

    moments: those of the peak, where someone says when one ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.moments: list[Moment] = []
        self._most = 0  # of the present moment
        self._alive: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled here, and to skip it torch would import torch._dynamo, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}  # made earlier, or already counted
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        self._most = max(self._most, self.now)
        return result

    def end_moment(self, elements: int) -> None:
        """A gradient of so many elements is complete."""
        self.moments.append(Moment(self._most, elements))
        self._most = self.now

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def stage_footprint(config: ModelConfig, stage: StageRange, settings: RankSettings) -> Footprint:
    """A whole stage, its loss included."""
    key = settings.of_sizes()
    ends = config.with_blocks("---")
    parts = [_footprint(ends, EMBEDDING, (), key)] if stage.has_embedding else []
    for index in range(stage.first, stage.stop):
        same_letter = config.with_blocks(3 * config.blocks[index])
        precisions = tuple(settings.precision(info.name) for info in block_linears(index, config))
        parts.append(_footprint(same_letter, BLOCK, precisions, key))
    if stage.has_head:
        precisions = tuple(settings.precision(info.name) for info in last_linears(config))
        parts.append(_footprint(ends, HEAD, precisions, key))
    kept = kept_by_all = sum(part.kept for part in parts)
    peak = last = later = 0  # later: of parts whose backward pass came before
    sums = _Sums(settings)
    for part in reversed(parts):
        kept -= part.kept
        peak = max(peak, kept + part.peak + later)
        for moment in part.moments:
            last = max(last, kept + moment.most + later + sums.arrived)
            sums.send(moment.elements)
        later += part.deferred
    tables = dict(ChainMap(*(dict(part.tables) for part in parts)))
    # torch's pipeline keeps what a stage sends on until its backward pass; the last one returns a number
    sent = 0 if stage.has_head else settings.tokens // settings.tp * config.hidden * settings.dtype.itemsize
    beside = sent + sum(tables.values())
    return Footprint(kept_by_all + beside, peak + beside, later, tables, (), last + beside, sums.arrived)


@functools.cache
def _footprint(
    config: ModelConfig, stage: StageRange, precisions: tuple[LinearPrecision, ...], settings: RankSettings
) -> Footprint:
    """The stage is run on the first rank, which holds the remainder of an uneven vocabulary."""
    meta, backend = torch.device("meta"), SizedBackend(settings.backend, on_gpu=settings.on_gpu)
    layout = ParallelConfig(tp=settings.tp, cp=settings.cp, ep=settings.ep)
    mesh = draw_mesh(layout, layout.smallest_world, rank=0)
    wgrad = WgradPlan.choose(defer=settings.defers_wgrad, overlap=settings.on_gpu and settings.tp > 1)
    context = LayerContext.of(mesh, backend, StepClock(0), settings.dtype, meta, wgrad=wgrad)
    model = Decoder(
        config.by_torch(),
        context,
        stage,
        keep_documents_apart=settings.keep_documents_apart,
        recompute=settings.recompute,
    )
    use_fused_norms(model, config.norm_impl)
    for linear, precision in zip(linears_of(model).values(), precisions, strict=True):
        linear.precision = precision
        narrow = settings.sums_in_bf16(dims=2) and not linear.weight.placement.tp_replicated
        dtype = torch.bfloat16 if narrow else torch.float32
        linear.weight.main_grad = torch.empty_like(linear.weight, dtype=dtype)
    live = LiveBytes()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, LogicalParameter)
        if not parameter.requires_grad:
            continue
        # a tied table is summed after the step's last backward pass
        tied = name == COPY or (config.tied_embeddings and name in TABLES)
        elements = 0 if tied else parameter.numel()
        parameter.grad_ready = functools.partial(live.end_moment, elements)
        parameter.register_post_accumulate_grad_hook(functools.partial(_drop_grad, parameter))
    if model.mtp is not None:
        model.mtp.embedding.weight.main_grad = torch.empty_like(model.mtp.embedding.weight, dtype=torch.float32)
    of_labels = cross_entropy_of(config, mesh.tp)
    next_token, how = of_labels, settings.distillation
    if how is not None:
        next_token = distance_of(config, mesh.tp, weight=how.weight, temperature=how.temperature)
    ids = torch.empty(settings.micro_batch, settings.seq_length // settings.cp, dtype=torch.int64, device=meta)
    hidden = torch.empty(
        ids.numel() // settings.tp, config.hidden, dtype=settings.dtype, device=meta, requires_grad=True
    )

    tokens = Tokens(ids, ids, ids)
    ahead = ids[..., None, None].expand(*ids.shape, config.mtp.depth, 2) if model.mtp is not None else None

    def forward() -> Tensor:
        output = model.run(ids if stage.has_embedding else hidden.clone(), tokens, ahead)
        if isinstance(output, Tensor) and not stage.has_head:
            return output
        every = output if isinstance(output, list) else [output]
        losses = [next_token(every[0], ids.reshape(-1)), *(of_labels(one, ids.reshape(-1)) for one in every[1:])]
        return torch.stack([loss.sum() for loss in losses]).sum()

    with cuda_kernels(on_gpu=settings.on_gpu):
        counted = _count(forward, context.queue.drain if context.queue else lambda: None, hidden, live)
    tables = {key: sum(storage.nbytes() for storage in _storages(table)) for key, table in tokens.tables.items()}
    return replace(counted, tables=tables)


class _Sums:
    """Sums of gradients that a rank receives while others are computed. arrived: bytes; a rank holds its share.

    Gradients leave when a bucket is full (optim/layout.py) and are held until those of the step are all summed. In BF16
    the sums have a place, and what is held are the messages of the last two buckets.
    """

    def __init__(self, settings: RankSettings) -> None:
        self.arrived = 0
        self._settings = settings
        self._waiting = self._newest = 0

    def send(self, elements: int) -> None:
        """A gradient of so many elements is complete."""
        self._waiting += elements
        if self._settings.replicas > 1 and self._waiting >= self._settings.optim.bucket_numel:
            if self._settings.sums_in_bf16(dims=2):
                self.arrived, self._newest = BF16 * (self._newest + self._waiting), self._waiting
            else:
                self.arrived += self._waiting * FP32 // self._settings.replicas
            self._waiting = 0


def _drop_grad(parameter: LogicalParameter, _: Tensor) -> None:
    """Stand in for the optimizer, which adds it to its buffer, unless its layer has and has said so."""
    if parameter.grad is not None:
        parameter.grad = None
        assert parameter.grad_ready is not None
        parameter.grad_ready()


def _count(forward: Callable[[], Tensor], drain: Callable[[], None], leaf: Tensor, live: LiveBytes) -> Footprint:
    forward()  # fills caches: the quantized copies of weights are not activations, tables are those of other blocks too
    with live:
        output = forward()
        end = get_gradient_edge(output)
        shape = output.shape
        dtype = output.dtype
        del output  # it goes on to the next block
        kept = live.now
        torch.autograd.backward([end], [torch.empty(shape, dtype=dtype, device="meta")])
        leaf.grad = None
        deferred = live.now
        drain()
        live.end_moment(0)
    return Footprint(kept, live.peak, deferred, {}, tuple(live.moments))
