"""Which link each axis of a layout uses, and how long a message takes on it.

Ranks are laid out tp, cp, dp, pp from the inside (comm/mesh.py), and a domain holds consecutive ranks. So a group is
inside one domain if it spans no more ranks than the domain has; otherwise its messages cross the network, and each
rank's bytes leave by its own network link (`rails` = 1) or by those of several ranks of the group (NCCL's rings over
all network cards; more is assumed only if asked for).

Not here: how many bytes there are (traffic.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.planning.cost.machines import Machine

BASE_SECONDS, HOP_SECONDS = 8.4e-6, {"inner": 3.4e-6, "network": 9.6e-6}
"""Of a collective that is limited by bandwidth: NCCL's src/graph/tuning.cc up to 2.18, ring, protocol Simple; later
versions have 14.0 us for the network."""
SMALL_SECONDS, SMALL_HOP_SECONDS = 4.4e-6, {"inner": 0.52e-6, "network": 5.0e-6}
"""Of an all-reduce of a few bytes: the same file, tree, protocol LL; later versions have 6.8, 0.6 and 5.0 us."""


@dataclass(frozen=True)
class Path:
    """What the messages of one group cross.

    size: ranks of the group. inside: of them in one domain. crosses: whether some are in others. bytes_per_second: what
    one rank sends.
    """

    size: int
    inside: int
    crosses: bool
    bytes_per_second: float

    def seconds(self, num_bytes: float) -> float:
        """Seconds of sending `num_bytes`, without latency."""
        return num_bytes / self.bytes_per_second

    def exchange_seconds(self, num_bytes: float) -> float:
        """Seconds of an all-to-all: what stays in the domain and what leaves it go at the same time by their links."""
        if not self.crosses:
            return self.seconds(num_bytes)
        return self.seconds(num_bytes * (self.size - self.inside) / (self.size - 1))

    @property
    def latency(self) -> float:
        """Seconds until the first byte of an all-gather or reduce-scatter has come round.

        Inside a domain ring steps; between domains a logarithm of their number (NCCL's PAT since 2.23).
        """
        if self.size == 1:
            return 0.0
        return BASE_SECONDS + (self.inside - 1) * HOP_SECONDS["inner"] + self._levels * HOP_SECONDS["network"]

    @property
    def small_latency(self) -> float:
        """Seconds of an all-reduce of a few bytes: up a tree and down again."""
        if self.size == 1:
            return 0.0
        hops = (self.inside - 1) * SMALL_HOP_SECONDS["inner"] + self._levels * SMALL_HOP_SECONDS["network"]
        return SMALL_SECONDS + 2 * hops

    @property
    def _levels(self) -> int:
        return math.ceil(math.log2(-(-self.size // self.inside)))


def paths(
    parallel: ParallelConfig,
    dp: int,
    machine: Machine,
    rails: float = 1.0,
    *,
    with_owners: bool = False,
    with_experts: bool = False,
) -> dict[str, Path]:
    """Axis of traffic.py -> what it crosses; `amax` are the ranks that share a scale.

    dp: the resolved size. rails: see `Assumptions`. with_owners: the matrices of Muon too. with_experts: rows to routed
    experts and their gradients too.
    """
    tp, cp = parallel.tp, parallel.cp
    groups = {
        "tensor": (1, tp),
        "context": (tp, cp),
        "data": (tp, dp * cp),
        "pipeline": (tp * cp * dp, parallel.pp),
        "amax": (1, tp * cp),
    }
    if with_owners:
        groups["matrices"] = (1, tp * cp * dp)
    if with_experts:
        groups |= {"experts": (1, parallel.ep), "expert_data": (parallel.ep, tp * cp * dp // parallel.ep)}
    return {axis: _path(stride, size, machine, rails) for axis, (stride, size) in groups.items()}


def _path(stride: int, size: int, machine: Machine, rails: float) -> Path:
    inside = min(size, max(1, machine.domain_gpus // stride))
    crosses = inside < size
    network = min(machine.network_gb_per_second * min(rails, inside), machine.inner_gb_per_second)
    return Path(size, inside, crosses, 1e9 * (network if crosses else machine.inner_gb_per_second))
