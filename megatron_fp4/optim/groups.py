"""Which rows of which parameters are updated together.

One idea: the only thing that differs between parameters is the weight decay, and the placement says it. An update group
is the list of flat FP32 tensors that this rank owns under one weight decay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megatron_fp4.comm.rect import Placement


@dataclass
class UpdateGroup:
    """Parallel lists of FP32 tensors, one entry per owned run of rows of a parameter."""

    weight_decay: float
    masters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)

    def add(self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        self.masters.append(master)
        self.grads.append(grad)
        self.exp_avgs.append(exp_avg)
        self.exp_avg_sqs.append(exp_avg_sq)


def decay_of(placement: Placement, weight_decay: float) -> float:
    """Weight decay of a parameter: norms, biases and state-space scalars say `decay=False`."""
    return weight_decay if placement.decay else 0.0
