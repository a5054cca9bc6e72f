"""Which GEMM made the exact zeros of a weight gradient dw[n, k] = sum over t of dy[t, n] x[t, k].

A dead row n (dy) or column k (x) makes a whole line of zeros. Whether the line would be zero in BF16 too is told by
where the channel died. Of the two linears around an activation, u = x w1^T, h = act(u), y = h w2^T:

    h dead, u alive or w1's row zero        structural: squared ReLU is off for every token, BF16 has the same zeros
    u dead, though w1's row is not          Fprop of the first linear: row f of dw1, column f of dw2
    dh dead, though w2's column is not      Dgrad of the second linear: row f of dw1

Everything else is dead where it enters, for a reason that the masks do not hold (attention and the state space mix
channels), and counts as structural. Zeros on no dead line are Wgrad's own: its operands were rounded to nothing.

Not here: the masks (probe.py); counting the zeros (train/telemetry/monitors/health.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.precision.health.probe import Channels
from megatron_fp4.precision.spec import LinearPrecision

FIELDS = ("structural", "fprop", "dgrad", "dead_inputs", "dead_outputs", "lost_y", "lost_dx")
"""What `count_lines` counts, FP64: elements on dead lines by origin, dead channels of x and of dy, channels that Fprop
and Dgrad of this linear lost."""


@dataclass(frozen=True, eq=False)
class LinearMasks:
    """The live channels of a linear over all ranks and microbatches, bool `[E, C]`; E = 1 without experts."""

    live: dict[Channels, Tensor]
    precision: LinearPrecision

    @property
    def lost_y(self) -> Tensor:
        """Output channels that died in Fprop, `[E, N]`."""
        lost = self.live[Channels.w_rows] & ~self.live[Channels.y] & self.live[Channels.x].any(1, keepdim=True)
        return lost & self.precision.fprop.quantized

    @property
    def lost_dx(self) -> Tensor:
        """Input channels that died in Dgrad, `[E, K]`."""
        lost = self.live[Channels.w_columns] & ~self.live[Channels.dx] & self.live[Channels.dy].any(1, keepdim=True)
        return lost & self.precision.dgrad.quantized


def count_lines(masks: LinearMasks, *, rows_by: Tensor | None = None, columns_by: Tensor | None = None) -> Tensor:
    """`FIELDS` of one linear. rows_by, columns_by: uint8 `[E, N]`, `[E, K]`, whose fault a dead one is: `BY_FPROP`,
    `BY_DGRAD`, or 0: structural; None: all structural."""
    dead_rows, dead_columns = ~masks.live[Channels.dy], ~masks.live[Channels.x]
    rows, columns = dead_rows.shape[1], dead_columns.shape[1]

    def count(dead: Tensor, by: Tensor | None, fault: int) -> Tensor:
        mask = dead & (by == fault) if by is not None else dead & (fault == 0)
        return mask.sum(1).double()

    row_structural, row_fprop, row_dgrad = (count(dead_rows, rows_by, fault) for fault in (0, BY_FPROP, BY_DGRAD))
    column_structural, column_fprop = (count(dead_columns, columns_by, fault) for fault in (0, BY_FPROP))
    other_columns = columns - column_structural
    other_rows = rows - row_structural
    structural = rows * columns - other_rows * other_columns
    fprop = row_fprop * other_columns + column_fprop * (other_rows - row_fprop - row_dgrad)
    counts = (
        *(structural, fprop, row_dgrad * other_columns),
        *(dead_columns.sum(1), dead_rows.sum(1), masks.lost_y.sum(1), masks.lost_dx.sum(1)),
    )
    return torch.stack([one.double().sum() for one in counts])


BY_FPROP, BY_DGRAD = 1, 2


def count_pair(first: LinearMasks, second: LinearMasks) -> tuple[Tensor, Tensor]:
    """`FIELDS` of the two linears around an activation. The first has one output per hidden channel, or, gated, several
    parts of so many."""
    experts, hidden = second.live[Channels.x].shape
    lost_u = first.lost_y.view(experts, -1, hidden).any(1)
    off = ~second.live[Channels.x] & ~lost_u
    by_row = torch.where(off, 0, torch.where(lost_u, BY_FPROP, torch.where(second.lost_dx, BY_DGRAD, 0)))
    parts = first.live[Channels.dy].shape[1] // hidden
    of_first = count_lines(first, rows_by=by_row.repeat(1, parts))
    return of_first, count_lines(second, columns_by=torch.where(lost_u, BY_FPROP, 0))
