"""What every layer of one model shares, and what travels with the activations.

Nothing is looked up. `LayerContext` is handed to constructors; `Tokens` is handed to `forward` beside the activations,
so that a recomputed or pipelined layer sees exactly the addresses and positions of its own microbatch.

Shape letters of the whole floor:
    B sequences in a microbatch, S tokens per sequence on this context-parallel rank, T = B * S, D hidden,
    F feed-forward, N/K output/input features of a linear, H heads, G key-value heads, E head dim,
    V vocabulary (rows of this rank).
Activations between layers are `x_TD`. Under tensor parallelism their rows are sharded (sequence parallelism): a rank
holds the T/tp rows `[tp_rank * T/tp, (tp_rank + 1) * T/tp)`. Column-parallel layers gather the rows, row-parallel ones
scatter the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.precision.backends import Backend
from megatron_fp4.precision.clock import StepClock
from megatron_fp4.precision.wgrad import WgradPlan, WgradQueue

Table = TypeVar("Table")

PLACE_BITS = 40
"""Of an address that say which token of the global batch it is: 10^12 tokens. Above them is the number of an expert."""

ROUND_BITS = 56
"""Bits of an address below the number of the round in which the same tokens pass a layer: 65,536 experts."""


@dataclass(frozen=True)
class LayerContext:
    """What every layer of one model, or of one of its pipeline stages, is constructed with.

    dtype: type of weights and activations (the compute dtype, BF16 or FP32). wgrad: when linears compute their weight
    gradients. queue: where those that `wgrad` defers wait for the pipeline schedule; None where it defers none. ep: the
    ranks that share the experts; edp: those that hold the same ones. Raises ValueError where a gradient would wait for
    nobody.
    """

    tp: Group
    cp: Group
    tp_cp: Group
    backend: Backend
    clock: StepClock
    dtype: torch.dtype
    device: torch.device
    wgrad: WgradPlan = WgradPlan.now
    queue: WgradQueue | None = None
    ep: Group = field(default_factory=lambda: Group.single("ep"))
    edp: Group = field(default_factory=lambda: Group.single("edp"))

    def __post_init__(self) -> None:
        if self.wgrad is WgradPlan.while_scattering and self.tp.size == 1:
            raise ValueError("on one tensor-parallel rank nothing is scattered that weight gradients could run beside")
        if (self.queue is not None) != (self.wgrad is WgradPlan.deferred):
            raise ValueError(f"wgrad = {self.wgrad.name}, but queue = {self.queue}: gradients wait in it if deferred")

    @staticmethod
    def of(
        mesh: ParallelMesh,
        backend: Backend,
        clock: StepClock,
        dtype: torch.dtype,
        device: torch.device,
        *,
        wgrad: WgradPlan = WgradPlan.now,
    ) -> LayerContext:
        """A context on the groups of a mesh, with a queue of its own where weight gradients are deferred."""
        queue = WgradQueue() if wgrad is WgradPlan.deferred else None
        groups = (mesh.tp, mesh.cp, mesh.tp_cp)
        return LayerContext(*groups, backend, clock, dtype, device, wgrad, queue, ep=mesh.ep, edp=mesh.edp)


def place_of(address: Tensor) -> Tensor:
    """Which token of the global batch an address is of, whatever the round."""
    return address & ((1 << PLACE_BITS) - 1)


def widen(x: Tensor) -> Tensor:
    """FP32 activations as FP64 on their way into a sum that a parallel layout may cut into parts; BF16 stays BF16.

    In FP32 compute, the proof mode, such sums are made in FP64 and rounded once to FP32. The order of summation, which
    is all that a layout changes, then disappears in the rounding. Without this, one last bit is enough to move a value
    across a rounding boundary of FP4, and two layouts drift apart within a few steps.
    """
    return x.double() if x.dtype == torch.float32 else x


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one microbatch on this context-parallel rank; all int64 `[B, S]`.

    address: global index of the token within the global batch (the address of its rounding noise and dropout), and
    above it the round (`next_round`).
    positions: position in its document (or in its sample where documents are not kept apart).
    documents: number of the document within the sample; tokens attend only inside their own.
    tables: what layers have derived from positions and documents alone (`once`): masks, angles.
    """

    address: Tensor
    positions: Tensor
    documents: Tensor
    tables: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, make: Callable[[], Table]) -> Table:
        """`make()`, by the first layer that asks; the others, and recomputation, get the same tensors.

        key: a name, and everything that goes into the table besides these tokens and the layout.
        """
        if key not in self.tables:
            with torch.no_grad():
                self.tables[key] = make()
        table: Table = self.tables[key]
        return table

    def next_round(self) -> Tokens:
        """The same tokens with other addresses, for noise that is not theirs; tables are shared."""
        return replace(self, address=self.address + (1 << ROUND_BITS))

    @staticmethod
    def of_one_document(num_tokens: int, device: str | torch.device = "cpu") -> Tokens:
        """The first `num_tokens` tokens of a batch whose first sample is one document."""
        ids = torch.arange(num_tokens, device=device).view(1, -1)
        return Tokens(ids, ids, torch.zeros_like(ids))

    @property
    def rows(self) -> Tensor:
        """Addresses of the T rows of a gathered activation, int64 `[T]`."""
        return self.address.reshape(-1)

    def local_rows(self, tp: Group) -> Tensor:
        """Addresses of the T/tp rows of this tensor-parallel rank."""
        return self.rows.chunk(tp.size)[tp.rank]
