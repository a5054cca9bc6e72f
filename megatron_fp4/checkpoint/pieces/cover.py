"""Whether pieces fill their tensors: every element in exactly one of them.

Comparing all pairs of a million rectangles takes minutes, and sums of sizes do not see a gap beside an overlap. So
every index of every dim gets a random number modulo a prime, and an element the product of those of its indices. The
sum over a rectangle is a product of differences of running sums; the pieces' sums add up to the whole tensor's if every
element is in one piece, and otherwise with a probability below 3 / 2^31 in each of two draws (Schwartz and Zippel).
Which pieces are wrong is looked for only then. Each process draws anew: of numbers that are known, lattice reduction
finds a few dozen overlapping pieces that leave a gap and have the right sum.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_fp4.checkpoint.pieces.layout import StoredLayout

PRIME = (1 << 31) - 1  # products of two numbers below it fit in int64
NUM_DRAWS = 2
SEED = secrets.randbits(64)


def check_cover(layout: StoredLayout) -> None:
    """Raise ValueError naming the first tensor, and ranks or pieces, unless each kind of each tensor is filled.

    The pieces lie in their tensors.
    """
    rows = list(map(slice, layout.first_rows[:-1].tolist(), layout.first_rows[1:].tolist()))
    sums = [_sums(layout, index, rows[index]) for index in range(len(layout.tensors))]
    for key, indices in layout.tensors_by_key.items():
        entries = {
            (layout.tensors[index].shape, dict(layout.tensors[index].kinds)[key.split("/")[0]]) for index in indices
        }
        if len(entries) > 1:
            first, second = (f"{shape} of {dtype}" for shape, dtype in sorted(entries)[:2])
            raise ValueError(f"{key}: two shards say {first} and {second}")
        shape = layout.tensors[indices[0]].shape
        whole = [_product(shape, (0,) * len(shape), shape, draw) for draw in range(NUM_DRAWS)]
        total = [sum(sums[index][draw] for index in indices) % PRIME for draw in range(NUM_DRAWS)]
        if total != whole:
            raise ValueError(
                _fault(layout, key, np.concatenate([np.arange(*_bounds(rows[index])) for index in indices]))
            )


def _bounds(rows: slice) -> tuple[int, int]:
    return rows.start, rows.stop


def _sums(layout: StoredLayout, index: int, rows: slice) -> list[int]:
    """The sum over the pieces of tensor `index`, for each draw."""
    shape = layout.tensors[index].shape
    low, size = layout.offset[rows], layout.size[rows]
    sums = []
    for draw in range(NUM_DRAWS):
        product = np.ones(len(low), np.int64)
        for dim, length in enumerate(shape):
            running = _running(length, dim, draw)
            product = product * ((running[low[:, dim] + size[:, dim]] - running[low[:, dim]]) % PRIME) % PRIME
        sums.append(int(product.sum()) % PRIME)
    return sums


def _product(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...], draw: int) -> int:
    product = 1
    for dim, length in enumerate(shape):
        running = _running(length, dim, draw)
        product = product * (int(running[high[dim]] - running[low[dim]]) % PRIME) % PRIME
    return product


@lru_cache(maxsize=64)
def _running(length: int, dim: int, draw: int) -> NDArray[np.int64]:
    """int64 [length + 1]: running sums, modulo the prime, of the random numbers of a dim."""
    numbers = np.random.default_rng((SEED, length, dim, draw)).integers(1, PRIME, length)
    return np.concatenate([[0], np.cumsum(numbers) % PRIME])


def _fault(layout: StoredLayout, key: str, rows: NDArray[np.int64]) -> str:
    """What is wrong with the pieces of a tensor that they do not fill."""
    shape = layout.tensors[int(layout.tensor[rows[0]])].shape
    numel, covered = math.prod(shape), int(layout.numel[rows].sum())
    pieces = sorted(_pieces(layout, rows, len(shape)))
    for (offset, size, _), (offset_2, size_2, rank) in pairwise(pieces):
        if (offset, size) == (offset_2, size_2):
            return (
                f"{key} at {offset} is written twice, the second time by rank {rank}; replicas must have writes=False"
            )
    if covered < numel:
        return f"{key}: the shards of all ranks hold {covered} of the {numel} elements of shape {shape}"
    opened: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
    for piece in pieces:  # along the rows, in which the pieces follow each other: few are open at a time
        offset, size, rank = piece
        opened = [other for other in opened if offset[0] < other[0][0] + other[1][0]]
        for start, length, other_rank in opened:
            spans = zip(offset, size, start, length, strict=True)
            if all(a < c + d and c < a + b for a, b, c, d in spans):
                return (
                    f"{key}: the shards of shape {length} at {start} (rank {other_rank}) and of shape {size} at"
                    f" {offset} (rank {rank}) are overlapping"
                )
        opened.append(piece)
    return f"{key}: the shards of all ranks do not fill shape {shape}"


def _pieces(
    layout: StoredLayout, rows: NDArray[np.int64], dims: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    for row in rows.tolist():
        offset, size = (tuple(part[row, : max(dims, 1)].tolist()) for part in (layout.offset, layout.size))
        yield offset, size, int(layout.rank[row])
