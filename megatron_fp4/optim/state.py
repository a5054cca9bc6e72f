"""What the optimizer shows to the checkpoint and to the training loop.

One idea: optimizer state is a list of rectangles of logical tensors. The checkpoint needs no knowledge of buckets or
ranks, and the optimizer none of files.
"""

from __future__ import annotations

from dataclasses import dataclass


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
