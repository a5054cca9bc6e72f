"""What the routers of a rank know of the global batch, and what follows from it: bias and overload.

After each step that updates the weights, the counts of all ranks of a stage are summed, exactly. An expert's bias gains
`bias_rate` where it was sent less than the mean, and loses it where it was sent more (arXiv 2408.15664); its overload
is how much more than the mean that was, as a part of it, and what the next step's global loss is weighted by. Both are
logical tensors, FP32 `[E]`, `<router>.bias` and `<router>.overload`: saved and loaded as weights are, changed by no
optimizer. A step that is skipped or undone leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_fp4.comm.collectives import all_reduce_sum
from megatron_fp4.comm.mesh import ParallelMesh
from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.layers.moe.losses import Tally
from megatron_fp4.layers.moe.router import Router


@dataclass(frozen=True, eq=False)
class RouterLoad:
    """What a router did in a global batch, on the device, the same on all ranks of its stage.

    counts_E: FP64 `[E]`, tokens sent to each expert, before any was dropped. means: FP64 `[4]`, see `losses.MEANS`.
    """

    counts_E: Tensor
    means: Tensor


class LoadBalance:
    """The routers of this rank's stages.

    loads: of the newest global batch that updated the weights, by the router's name (`blocks.3.moe.router`), for
    whoever shows them (train/telemetry/monitors/experts.py); reading one waits for the device.
    """

    def __init__(self, stages: Iterable[nn.Module], mesh: ParallelMesh) -> None:
        modules = [module for stage in stages for module in stage.modules()]
        self._routers = {module.name: module for module in modules if isinstance(module, Router)}
        self._mesh = mesh
        self.loads: dict[str, RouterLoad] = {}

    @property
    def parameters(self) -> list[LogicalParameter]:
        """What changes by the rule above, and has no gradient."""
        states = [state for router in self._routers.values() for state in (router.bias, router.overload)]
        return [state for state in states if state is not None]

    def begin(self) -> None:
        """Forget what was counted; begins a step."""
        for router in self._routers.values():
            router.tally.numbers.zero_()

    @torch.no_grad()
    def update(self) -> None:
        """Sum the counts of the step, and change bias and overload. Collective over the stage."""
        if not self._routers:
            return
        tallies = [router.tally.numbers for router in self._routers.values()]
        together = torch.cat(tallies)
        for group in (self._mesh.tp, self._mesh.dp_cp):
            together = all_reduce_sum(together, group)
        parts = together.split([len(tally) for tally in tallies])
        for (name, router), numbers in zip(self._routers.items(), parts, strict=True):
            total = Tally(numbers)
            self.loads[name] = RouterLoad(total.counts_E, total.means)
            _change(router, total.counts_E)


def _change(router: Router, counts_E: Tensor) -> None:
    mean = counts_E.mean()
    if router.bias is not None:
        router.bias.add_((mean - counts_E).sign().to(router.bias.dtype), alpha=router.config.bias_rate)
    if router.overload is not None:
        router.overload.copy_(counts_E / mean.clamp(min=1.0) - 1.0)
