"""What the ranks of a layout computed, against the whole tensors that one process computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_fp4.comm.rect import Shard


def assert_slices(reference: Mapping[str, Tensor], ranks: Sequence[Sequence[Shard]], *, within: float) -> None:
    """The shards of all ranks together are the logical tensors of `reference`, each element once, up to `within`.

    ranks: per rank, shards of one tensor each. within: see `slice_errors`.
    """
    for (name, rank), error in slice_errors(reference, ranks).items():
        assert error <= within, f"{name} on rank {rank} of {len(ranks)}: off by {error:.1e}, allowed is {within:.0e}"


def largest_error(reference: Mapping[str, Tensor], ranks: Sequence[Sequence[Shard]]) -> float:
    """The largest of `slice_errors`: what a planted bug does."""
    return max(slice_errors(reference, ranks).values())


def slice_errors(reference: Mapping[str, Tensor], ranks: Sequence[Sequence[Shard]]) -> dict[tuple[str, int], float]:
    """{(tensor, rank): error}, the largest of the rank's shards; infinite where it is not a number.

    An error is the root mean square of the difference over that of the whole logical tensor.
    """
    errors: dict[tuple[str, int], float] = {}
    times = {name: torch.zeros(whole.shape, dtype=torch.int64) for name, whole in reference.items()}
    for rank, shards in enumerate(ranks):
        for shard in shards:
            assert shard.name in reference, f"{shard.name} on rank {rank}: the reference has no such tensor"
            whole = reference[shard.name]
            assert shard.where.global_shape == whole.shape, f"{shard.name} on rank {rank}: {shard.where}"
            times[shard.name][shard.where.slices] += 1
            (values,) = shard.tensors.values()
            difference = (values.double() - whole[shard.where.slices].double()).square().mean().sqrt()
            error = float(difference / whole.double().square().mean().sqrt().clamp(min=1e-30))
            key = (shard.name, rank)
            errors[key] = max(errors.get(key, 0.0), error if error == error else float("inf"))
    for name, count in times.items():
        assert bool((count == 1).all()), f"{name}: not every element was computed once, but {count.unique().tolist()}"
    return errors
