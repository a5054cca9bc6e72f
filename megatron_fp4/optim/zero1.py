"""ZeRO-1: AdamW whose FP32 master weights and moments are divided by rows over the data-parallel ranks.

One idea: a bucket is summed, updated and gathered by flat ranges, and every range is a list of rectangles.

    backward      main_grad += gradient (FP32)                                     every rank, all rows
    finish_grads  reduce-scatter: my rows of the sum over dp x cp -> global norm    (tied copies and tp partials before)
    step          clip -> AdamW on my rows -> all-gather parameters                 (in the parameters' dtype)

The loss is normalised by the caller; nothing is divided here. A step whose gradient norm is not finite changes no state
on any rank. The update itself is in `adam.py`, files and formats are the checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_fp4.comm.collectives import all_gather_object
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.rect import Shard
from megatron_fp4.optim.adam import choose_adamw
from megatron_fp4.optim.clip import clip_factor, global_norm
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.grad_buffer import GradBuffer
from megatron_fp4.optim.groups import UpdateGroup, decay_of
from megatron_fp4.optim.layout import Run, make_buckets
from megatron_fp4.optim.param_buffer import ParamBuffer
from megatron_fp4.optim.state import StepReport

FP32_PER_MIB = 2**18


@dataclass(frozen=True, eq=False)
class OwnedRun:
    """Rows of a parameter that this rank updates, with flat FP32 views of their master, gradient and moments."""

    run: Run
    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"master": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


class Zero1AdamW:
    """The optimizer of one rank.

    named_parameters: all trainable parameters of this rank, each with a `.placement`, and with `.tied_group` (a Group
    of the ranks that hold a copy) where a weight lives on two stages. They become views into flat buffers and get
    `.main_grad` (FP32) and `.grad_ready`. Build it after the parameters have their initial values; all ranks must.
    sequence_parallel: replicated parameters have partial gradients on each tensor-parallel rank, which are summed.
    on_weights_changed: called after the parameters have been rewritten (step, load). sum_dtype: of `.main_grad` and of
    the sums over ranks; FP64 hides in the rounding how many microbatches and ranks a sum was cut into.
    Raises ValueError for a parameter without a valid placement, and for an implementation that is not installed.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        mesh: ParallelMesh,
        sequence_parallel: bool,
        on_weights_changed: Callable[[], None] | None = None,
        sum_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.step_count = config, 0
        self._mesh, self._on_weights_changed = mesh, on_weights_changed
        self.buckets = make_buckets(
            named_parameters,
            mesh.dp_cp,
            bucket_numel=max(1, int(config.bucket_mib * FP32_PER_MIB)),
            sum_replicated_over_tp=sequence_parallel and mesh.tp.size > 1,
        )
        if not self.buckets:
            raise ValueError("the optimizer got no parameters")
        self._device = self.buckets[0].kind.device
        overlap = config.overlap_reduce.enabled(self._device.type)
        self._grads = GradBuffer(self.buckets, mesh.dp_cp, mesh.tp, overlap=overlap, dtype=sum_dtype)
        self._params = ParamBuffer(self.buckets, mesh.dp_cp)
        self._masters = [part.float() for part in self._params.parts]  # FP32 parameters are their own masters
        self._moments = [[torch.zeros_like(master) for master in self._masters] for _ in ("exp_avg", "exp_avg_sq")]
        self._grad_parts = [part.float() for part in self._summed_parts()]
        self._owned = self._find_owned()
        self._adamw = choose_adamw(self._update_groups(), config)
        self._beside_forward = False
        self._finished = False

    # -- one step, in order ---------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Clear all gradients; begins a step."""
        self._grads.zero()
        self._finished = False

    def begin_last_microbatch(self) -> None:
        """The backward that follows completes the gradients, so full buckets may be sent during it.

        Call it before the last microbatch, or, where a pipeline schedule runs all microbatches in one call, before that
        call. Without it everything is sent in `finish_grads`.
        """
        self._grads.arm()

    def spoil_grads(self) -> None:
        """Make this step's gradients not finite, so that every rank skips it; before `finish_grads`."""
        self._grads.spoil()

    def finish_grads(self) -> float:
        """Complete the sums over all ranks; returns the global norm of the gradients, before clipping.

        The norm is rounded to FP32 and the same on every rank. Collective over the world, once a step.
        """
        assert not self._finished, "finish_grads was called twice in one step"
        self._grads.finish()
        for part, total in zip(self._grad_parts, self._summed_parts(), strict=True):
            if part is not total:
                part.copy_(total)
        self._finished = True
        counted = [each.grad for each in self._owned if self._is_owner(each.run)]
        return global_norm(counted, self._mesh.world, self._device)

    @torch.no_grad()
    def step(self, norm: float, *, lr: float, max_norm: float) -> StepReport:
        """Clip to `max_norm` (0 = off), update my rows, refresh the parameters. Skipped if the norm is not finite.

        norm: what `finish_grads` returned.
        """
        assert self._finished, "finish_grads comes first"
        if not math.isfinite(norm):
            return StepReport(lr, norm, 0.0, skipped=True, nonfinite=self._nonfinite_names())
        factor = clip_factor(norm, max_norm)
        if factor < 1.0:
            torch._foreach_mul_([each.grad for each in self._owned], factor)
        self.step_count += 1
        self._params.wait()  # what a module without a forward has not waited for may still be on its way
        self._adamw.update(lr, self.step_count)
        self._refresh()
        return StepReport(lr, norm, factor, skipped=False)

    # -- parameters and state -------------------------------------------------------------------------------------

    def gather_beside_forward(self, module: nn.Module) -> None:
        """Let the parameters of a step arrive during the next forward of `module`, each module waiting for its own.

        Has an effect if `overlap_gather` is enabled here. Whoever reads parameters outside a module's forward
        calls `wait_parameters` first.
        """
        if self.config.overlap_gather.enabled(self._device.type) and not self._beside_forward:
            self._params.gather_beside_forward(module)
            self._beside_forward = True

    def wait_parameters(self) -> None:
        """Until every parameter has the values of the last step."""
        self._params.wait()

    def state_shards(self) -> list[Shard]:
        """The rectangles of logical tensors whose state this rank holds; their tensors are views into live state."""
        self._params.wait()
        return [shard for owned in self._owned for shard in self._shards_of(owned, owned.state)]

    def grad_shards(self) -> list[Shard]:
        """The summed gradients of the rows that this rank updates, as "grad", between `finish_grads` and `step`."""
        assert self._finished, "finish_grads comes first"
        return [shard for owned in self._owned for shard in self._shards_of(owned, {"grad": owned.grad})]

    def after_load(self) -> None:
        """Parameters = masters, after the state (and `step_count`) was filled in. Collective over dp x cp."""
        self._refresh(wait=True)

    # -- internals ------------------------------------------------------------------------------------------------

    def _summed_parts(self) -> list[Tensor]:
        """My part of every bucket's gradients, in `sum_dtype`."""
        bounds = (bucket.bounds(self._mesh.dp_cp.rank) for bucket in self.buckets)
        return [flat[low:high] for flat, (low, high) in zip(self._grads.flats, bounds, strict=True)]

    def _find_owned(self) -> list[OwnedRun]:
        """All rows that this rank owns, with views of their gradient and state."""
        owned: list[OwnedRun] = []
        for index, bucket in enumerate(self.buckets):
            parts = (self._masters[index], self._grad_parts[index], *(m[index] for m in self._moments))
            owned += (
                OwnedRun(run, *(part[run.start : run.start + run.numel] for part in parts))
                for run in bucket.runs(self._mesh.dp_cp.rank)
            )
        return owned

    def _update_groups(self) -> list[UpdateGroup]:
        groups: dict[float, UpdateGroup] = {}
        for each in self._owned:
            decay = decay_of(each.run.slot.placement, self.config.weight_decay)
            groups.setdefault(decay, UpdateGroup(decay)).add(each.master, each.grad, each.exp_avg, each.exp_avg_sq)
        return list(groups.values())

    def _is_owner(self, run: Run) -> bool:
        """False on a rank that holds a replica of rows which another rank counts and saves."""
        placement = run.slot.placement
        return placement.writes and (not placement.tp_replicated or self._mesh.tp.rank == 0)

    def _shards_of(self, owned: OwnedRun, flats: dict[str, Tensor]) -> Iterator[Shard]:
        run = owned.run
        whole = {kind: flat.view(run.shape) for kind, flat in flats.items()}
        for rows, where in run.slot.placement.pieces(run.first_row, run.last_row):
            tensors = {kind: tensor[rows] for kind, tensor in whole.items()}
            yield Shard(where, tensors, writes=self._is_owner(run))

    def _refresh(self, wait: bool = False) -> None:
        self._params.refresh(self._masters, wait=wait or not self._beside_forward)
        if self._on_weights_changed is not None:
            self._on_weights_changed()

    def _nonfinite_names(self) -> tuple[str, ...]:
        """Logical names with a NaN or infinite gradient anywhere. Collective; only after a non-finite norm."""
        mine = set()
        for each in self._owned:
            run, grad = each.run, each.grad.view(each.run.shape)
            for rows, where in run.slot.placement.pieces(run.first_row, run.last_row):
                if not bool(torch.isfinite(grad[rows]).all()):
                    mine.add(where.name)
        return tuple(sorted(set().union(*all_gather_object(mine, self._mesh.world))))
