"""Random words for the stochastic rounding of stored state, by address: what is rounded, when, which element.

An element is named by its logical tensor, its row, and its place in the row; so no cut of the tensor changes a word,
and a resumed run draws those of the run without a stop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp4.comm.rect import Rectangle
from megatron_fp4.numerics.compiled import StageRunner
from megatron_fp4.numerics.random import column_words, combine, key_of, row_words


def rounding_words(where: Rectangle, device: torch.device, run: StageRunner, *address: int | str) -> Tensor:
    """int32 `[where.numel]`, row-major. address: what they are drawn for, the name of the tensor excepted."""
    columns = torch.zeros((), dtype=torch.int64, device=device)
    for dim in range(1, len(where.shape)):
        columns = columns.unsqueeze(-1) * where.global_shape[dim] + where.index(dim, device)
    key = key_of(*address, where.name)
    row_a, row_b = row_words(key, where.index(0, device))
    column = column_words(key, columns.reshape(-1))
    return run(combine, row_a=row_a[:, None], row_b=row_b[:, None], column=column[None, :]).view(-1)
