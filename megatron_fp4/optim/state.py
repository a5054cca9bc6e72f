"""What the optimizer shows to the checkpoint and to the training loop.

One idea: optimizer state is a list of rectangles of logical tensors. The checkpoint needs no knowledge of buckets or
ranks, and the optimizer none of files.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StateShard:
    """One rectangle of the logical tensor `name`, owned by this rank.

    offset: position of the rectangle in `global_shape`. tensors: "master", "exp_avg" and "exp_avg_sq", FP32, each of
    the rectangle's shape, views into live state: filling them in place loads (then call `after_load`).
    writes: False on a rank that holds a replica, whose owner saves it.
    """

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensors: dict[str, Tensor]
    writes: bool


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    grad_norm: global norm before clipping, FP32-rounded, the same on every rank. clip_factor: what the gradients were
    multiplied by. skipped: the norm was not finite and no state changed, on any rank. nonfinite: the logical names of
    the offending parameters of all ranks (empty unless skipped).
    """

    lr: float
    grad_norm: float
    clip_factor: float
    skipped: bool
    nonfinite: tuple[str, ...] = ()
