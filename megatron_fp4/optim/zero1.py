"""ZeRO-1: an optimizer whose FP32 master weights and moments are divided over the data-parallel ranks.

    backward      main_grad += gradient (FP32, or rounded to BF16)                  every rank, all elements
    sum_grads     reduce-scatter: own part of the sum over dp x cp -> its square    (tied copies and tp partials before)
                  (of experts: over edp, the ranks that hold the same ones)
    step          clip -> update of own part -> all-gather parameters                (in the parameters' dtype)

A bucket of parameters is summed, updated and gathered by flat ranges (layout.py), and every range is a list of
rectangles (state.py), which is what the checkpoint sees. The loss is normalised by the caller; nothing is divided here.
A step whose gradient norm is not finite changes no state on any rank. Nothing is read back from the device but in
`finish_grads`, which is for whoever has no message between ranks of his own. Not here: the update itself (adam.py,
muon/).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.comm.rect import Placement, Shard
from megatron_fp4.optim.buckets import buckets_for
from megatron_fp4.optim.by_name import sum_by_name
from megatron_fp4.optim.clip import clip_factor, norm_over, sum_of_squares
from megatron_fp4.optim.config import OptimConfig
from megatron_fp4.optim.grad_buffer import GradBuffer
from megatron_fp4.optim.kept.adamw import PartwiseAdamW
from megatron_fp4.optim.kept.part import KeptPart
from megatron_fp4.optim.muon.update import make_muons
from megatron_fp4.optim.param_buffer import ParamBuffer
from megatron_fp4.optim.state import GradientFree, OwnedPiece, RowScales, StepReport, gradient_free_shards


class LateGradientError(RuntimeError):
    """A gradient was added after its bucket had been sent, on some rank: the sums are worthless on all."""


class Zero1Optimizer:
    """The optimizer of one rank.

    named_parameters: all trainable parameters of this rank, as `LogicalParameter`. They become views into flat buffers
    and get their `main_grad` and `grad_ready`. Build it after they have their initial values; all ranks must.
    sequence_parallel: replicated parameters have partial gradients on each tensor-parallel rank, which are summed.
    on_weights_changed: called after the parameters have been rewritten (step, load). sum_dtype: of `main_grad`, if
    it is not to be BF16 (buckets.py), and of the sums over ranks; FP64 hides in the rounding how many microbatches and
    ranks a sum was cut into. stage: the ranks of this pipeline stage, which Muon needs
    (`comm.mesh.build_stage_group`). rows: scales rows after each update.
    gradient_free: what changes once a step, and not by a gradient. seed: of the stochastic rounding of moments.
    compile: the conversions of moments that are not kept in FP32.
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
        stage: Group | None = None,
        rows: RowScales | None = None,
        gradient_free: GradientFree | None = None,
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        self.config = config
        self.step_count = 0
        self._mesh, self.rows = mesh, rows
        self.gradient_free = gradient_free
        self._on_weights_changed = on_weights_changed
        summed = sequence_parallel and mesh.tp.size > 1
        self.buckets = buckets_for(named_parameters, config, mesh, sum_replicated_over_tp=summed, sum_dtype=sum_dtype)
        if not self.buckets:
            raise ValueError("the optimizer got no parameters")
        self._device = self.buckets[0].kind.device
        overlap = config.overlap_reduce.enabled(self._device.type)
        self._grads = GradBuffer(self.buckets, mesh.tp, overlap=overlap)
        self._params = ParamBuffer(self.buckets)
        self._parts = [
            KeptPart(bucket, parameters, grads, config, seed, compile)
            for bucket, parameters, grads in zip(self.buckets, self._params.parts, self._grads.parts, strict=True)
        ]
        self._owned = [
            OwnedPiece(piece, part, self._writes(piece.slot.placement)) for part in self._parts for piece in part.pieces
        ]
        self._adamw = PartwiseAdamW(self._parts, config)
        self._muons = make_muons(self.buckets, self._parts, config, mesh, stage or mesh.dp_cp, sum_dtype)
        self._beside_forward = False
        self._finished = False

    # -- one step, in order ---------------------------------------------------------------------------------------

    def zero_grad(self) -> None:
        """Clear all gradients; begins a step."""
        self._grads.zero()
        if self.rows is not None:
            self.rows.begin()
        if self.gradient_free is not None:
            self.gradient_free.begin()
        self._finished = False

    def begin_last_microbatch(self, num_microbatches: int = 1) -> None:
        """The backward that follows completes the gradients, so full buckets may be sent during it.

        Call it before the last microbatch, or, where a pipeline schedule runs all of `num_microbatches` in one call,
        before that call. Without it everything is sent in `sum_grads`.
        """
        self._grads.arm(num_microbatches)

    @property
    def grads_came_late(self) -> bool:
        """Whether a gradient of this rank came after its bucket had been sent: a weight was used more often than in the
        last step of as many microbatches. Then the sums are worthless on all ranks, and the step is to be repeated from
        `zero_grad` on, without `begin_last_microbatch`."""
        return self._grads.late

    def sum_grads(self) -> Tensor:
        """Complete the sums over all ranks; returns this rank's part of the squared global norm, before clipping.

        An FP64 scalar on the device: the parts of all ranks, added in rank order, are what `clip.norm_of` takes.
        Collective over dp x cp, once a step.
        """
        assert not self._finished, "the sums were completed twice in one step"
        self._grads.finish()
        for part, total in zip(self._parts, self._grads.parts, strict=True):
            if part.grad is not total:
                part.grad.copy_(total)
        self._finished = True
        return sum_of_squares([owned.grad for owned in self._owned if owned.writes], self._device)

    def finish_grads(self) -> float:
        """`sum_grads`, and the global norm from it, rounded to FP32, the same on every rank. Collective over the world.

        Raises LateGradientError on all ranks.
        """
        square = self.sum_grads()
        norm, late = norm_over(square, self._mesh.world, flag=self.grads_came_late)
        if late:
            raise LateGradientError("a weight was used more often than in the step before, after its gradient had left")
        return norm

    @torch.no_grad()
    def step(self, norm: float, *, lr: float, max_norm: float) -> StepReport:
        """Clip to `max_norm` (0 = off), update the own part, refresh the parameters. Skipped if the norm is not finite.

        norm: what `finish_grads` returns.
        """
        assert self._finished, "finish_grads comes first"
        if not math.isfinite(norm):
            return StepReport(lr, norm, 0.0, skipped=True, nonfinite=self._nonfinite_names())
        factor = clip_factor(norm, max_norm)
        if factor < 1.0:
            torch._foreach_mul_([part.grad for part in self._parts], factor)
        self.step_count += 1
        self._params.wait()  # what a module without a forward has not waited for may still be on its way
        self._adamw.update(self.config.adamw_lr(lr), self.step_count)
        for muon in self._muons:
            muon.update(lr, self.step_count)
        factors = self.rows.row_factors() if self.rows is not None else {}
        for owned in self._owned if factors else ():
            if (of_rows := factors.get(owned.piece.slot.parameter)) is not None:
                owned.scale_rows(of_rows)
        if self.gradient_free is not None:
            self.gradient_free.update()
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
        """Return when every parameter has the values of the last step."""
        self._params.wait()

    def state_shards(self) -> list[Shard]:
        """The rectangles of logical tensors whose state this rank holds, in FP32: `read` gives the values of a kind.

        What is kept in FP32 is a view of live state.
        """
        return self.updated_shards() + self._gradient_free_shards()

    def updated_shards(self) -> list[Shard]:
        """What `state_shards` gives of tensors with gradients."""
        self._params.wait()
        return [shard for owned in self._owned for shard in owned.state_shards()]

    def kept_tensors(self) -> list[Tensor]:
        """Everything that is kept of state between two steps; FP32 parameters are their own masters."""
        return [tensor for part in self._parts for store in part.stores.values() for tensor in store.tensors]

    def gradient_tensors(self) -> list[Tensor]:
        """Everything that is kept of gradients."""
        return self._grads.tensors

    def state_to_fill(self) -> list[Shard]:
        """The same rectangles with tensors to be filled, whatever is kept; `after_load` takes what is in them."""
        self._params.wait()
        flats = {part: part.to_fill() for part in self._parts}
        shards = [shard for owned in self._owned for shard in owned.shards(flats[owned.part])]
        return shards + self._gradient_free_shards()

    def grad_shards(self) -> list[Shard]:
        """The summed gradients of what this rank updates, as "grad", between `sum_grads` and `step`."""
        assert self._finished, "finish_grads comes first"
        return [shard for owned in self._owned for shard in owned.shards({"grad": owned.part.grad})]

    def after_load(self, step_count: int) -> None:
        """Take what `state_to_fill` has given; parameters = masters of `step_count` steps. Collective over dp x cp."""
        self.step_count = step_count
        for part in self._parts:
            part.take(step_count)
        self._refresh(wait=True)

    def sum_by_name(self, local: Mapping[str, float]) -> dict[str, float]:
        """Sums over all ranks of numbers by logical name, of all names and sorted, the same on all. Collective."""
        return sum_by_name(self.buckets, local, self._mesh)

    # -- internals ------------------------------------------------------------------------------------------------

    def _gradient_free_shards(self) -> list[Shard]:
        if self.gradient_free is None:
            return []
        writes = self._mesh.dp_cp.rank == self._mesh.tp.rank == 0
        return list(gradient_free_shards(self.gradient_free.parameters, writes=writes))

    def _writes(self, placement: Placement) -> bool:
        """False on a rank that holds a replica of elements which another rank counts and saves."""
        return placement.writes and (not placement.tp_replicated or self._mesh.tp.rank == 0)

    def _refresh(self, wait: bool = False) -> None:
        self._params.refresh([part.master for part in self._parts], wait=wait or not self._beside_forward)
        if self._on_weights_changed is not None:
            self._on_weights_changed()

    def _nonfinite_names(self) -> tuple[str, ...]:
        """Logical names with a NaN or infinite gradient anywhere. Collective; only after a non-finite norm."""
        shards = self.grad_shards()
        finite = [torch.isfinite(shard.tensors["grad"]).all() for shard in shards]
        good = torch.stack(finite).tolist() if finite else []  # one read-back
        bad = [shard.name for shard, is_good in zip(shards, good, strict=True) if not is_good]
        return tuple(name for name, count in self.sum_by_name(dict.fromkeys(bad, 1.0)).items() if count)
