"""Explicit zero padding of a linear whose shapes the tiles do not divide (`pad: true` on its GEMMs).

One idea: the linear op pads its tensors before any backend sees them and cuts its results, so a padded linear computes,
bit for bit, what the same linear with zeros written into larger tensors computes. Zeros raise no amax, quantize to zero
and add nothing to a product. Only in a group of the Hadamard transform that is part padding do they take part in the
rounding, with noise of addresses that no element of the tensor has.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(x: Tensor, rows: int, cols: int) -> Tensor:
    """`x [R, C]` with zeros at both ends, up to multiples of `rows` and `cols`; x itself where it fits."""
    below, right = -x.shape[0] % rows, -x.shape[1] % cols
    return F.pad(x, (0, right, 0, below)) if below or right else x


def padded_index(index: Tensor, multiple: int) -> Tensor:
    """Global indices, int64, with negative ones for the padding: others for each last index, so for each microbatch."""
    count = -len(index) % multiple
    if not count:
        return index
    return torch.cat([index, -1 - index[-1] * multiple - torch.arange(count, device=index.device)])
