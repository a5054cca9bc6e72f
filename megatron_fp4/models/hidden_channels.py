"""Which linears stand around an activation: channel f of the first's output becomes channel f of the second's input.

Not so around attention, state space and latent projections, which mix channels or have nothing between.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megatron_fp4.models.block import LinearInfo

FIRST = ("up", "gate_up")


def around_activations(linears: Sequence[LinearInfo]) -> list[tuple[str, str]]:
    """(`blocks.3.mlp.up`, `blocks.3.mlp.down`) and the like, of dense MLPs, shared and routed experts.

    linears: of the model or a part, in the order of execution.
    """
    names = [info.name.rpartition(".") for info in linears]
    return [
        (f"{place}.{role}", f"{place}.down")
        for (place, _, role), (other, _, last) in pairwise(names)
        if role in FIRST and last == "down" and place == other
    ]
