"""The orthogonal matrix next to a given one, by matrix products alone.

X / ||X||_F has singular values in (0, 1]; each step applies an odd polynomial to all of them at once, and after a few
they are close to 1, while the singular vectors stay: X = U S V^T becomes about U V^T. (K. Jordan et al., "Muon: an
optimizer for hidden layers in neural networks"; torch/optim/_muon.py, whose order of operations this is.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_fp4.optim.muon.config import Triple

BLOCK = 2**22  # elements that are divided at once, in `norm_dtype`
SMALLEST_NORM = 1e-20  # a matrix of zeros stays one; torch stops at 1e-7, which small gradients reach


def orthogonalize(
    x: Tensor, triples: Sequence[Triple], *, dtype: torch.dtype, norm_dtype: torch.dtype = torch.float32
) -> Tensor:
    """About U V^T of `x [m, n]` = U S V^T, in `dtype`, in which the products are made.

    The smaller of the two sides is the one that is multiplied. norm_dtype: of the first division; `dtype` itself is
    what torch.optim.Muon does.
    """
    tall = x.shape[0] > x.shape[1]
    wide = x.to(dtype, copy=True)
    wide = wide.T if tall else wide
    norm = torch.linalg.vector_norm(wide, dtype=norm_dtype).clamp(min=SMALLEST_NORM)
    for rows in wide.split(max(1, BLOCK // wide.shape[1])):  # of each block a copy, not of the whole
        rows.copy_(rows.to(norm_dtype) / norm)
    for a, b, c in triples:
        gram = wide @ wide.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.addmm(wide, polynomial, wide, beta=a)
    return wide.T if tall else wide


def orthogonalization_flops(rows: int, columns: int, steps: int) -> int:
    """FLOPs of one matrix: a step is two products of short x short x long and one of short^3."""
    short, long = sorted((rows, columns))
    return steps * 2 * (2 * short * short * long + short**3)
