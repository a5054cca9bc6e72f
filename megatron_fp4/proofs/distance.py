"""The records of a layout against those of one process: the difference of every logical tensor.

A difference is relative to the size of the whole logical tensor (for parameters: of its change since the start), so
that zero means bitwise equal and one means unrelated, whatever the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fp4.comm.rect import Rectangle, Shard
from megatron_fp4.proofs.parity import Record


@dataclass(frozen=True)
class Difference:
    """How far one rectangle is from the reference.

    error: root mean square of the difference over that of the whole reference tensor (for parameters: of its change
    since the start). ratio: best factor between the two, and unexplained: the error that remains after it; both are for
    diagnosis.
    """

    name: str
    error: float
    ratio: float = 1.0
    unexplained: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """Errors of one layout in one case; relative ones, 0 = bitwise equal.

    The lists of differences hold the worst rectangle of each tensor, from the output of the model to its input (the
    order of the backward pass).
    """

    initial: list[Difference]
    losses: list[float]
    norms: list[float]
    norm_ratio: float
    grads: list[Difference]
    masters: dict[int, list[Difference]]
    replicas: list[str]
    """Parameters of which some rank holds other bits than the owner."""

    @property
    def loss_error(self) -> float:
        return max(self.losses)

    @property
    def norm_error(self) -> float:
        return max(self.norms)


def worst(differences: Iterable[Difference]) -> float:
    """The largest error, 0 if there are none."""
    return max((difference.error for difference in differences), default=0.0)


def compare(reference: Record, records: Sequence[Record]) -> Comparison:
    """The ranks of a layout against one process."""
    start = assemble(reference.masters[0], "master")
    losses = [sum(parts) for parts in zip(*(record.losses for record in records), strict=True)]
    masters = {step: [shard for record in records for shard in record.masters[step]] for step in reference.masters}
    changes = {
        step: _differences(assemble(reference.masters[step], "master"), masters[step], "master", start)
        for step in sorted(reference.masters)[1:]
    }
    grads = [shard for record in records for shard in record.grads]
    live = [shard for record in records for shard in record.live]
    return Comparison(
        initial=_differences(start, masters[0], "master"),
        losses=[_relative(ours, theirs) for ours, theirs in zip(losses, reference.losses, strict=True)],
        norms=[
            max(_relative(record.norms[step], norm) for record in records) for step, norm in enumerate(reference.norms)
        ],
        norm_ratio=records[0].norms[0] / reference.norms[0],
        grads=_differences(assemble(reference.grads, "grad"), grads, "grad"),
        masters=changes,
        replicas=_stray_replicas(assemble(masters[max(masters)], "master"), live),
    )


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / max(abs(theirs), 1e-30) if ours == ours else float("inf")


def assemble(shards: Iterable[Shard], kind: str) -> dict[str, Tensor]:
    """Logical tensors from their rectangles, FP32. Raises AssertionError if a tensor is not covered."""
    wholes: dict[str, Tensor] = {}
    covered: dict[str, Tensor] = {}
    for shard in shards:
        where = shard.where
        if where.name not in wholes:
            wholes[where.name] = torch.zeros(where.global_shape)
            covered[where.name] = torch.zeros(where.global_shape, dtype=torch.bool)
        wholes[where.name][where.slices] = shard.tensors[kind]
        covered[where.name][where.slices] = True
    missing = [name for name, mask in covered.items() if not bool(mask.all())]
    assert not missing, f"no rank holds some rows of {missing}"
    return wholes


def _differences(
    reference: dict[str, Tensor], shards: Sequence[Shard], kind: str, start: dict[str, Tensor] | None = None
) -> list[Difference]:
    """The worst rectangle of each tensor. Raises AssertionError if `shards` has other tensors than the reference."""
    absent = sorted(set(reference) - {shard.name for shard in shards})
    unknown = sorted({shard.name for shard in shards} - set(reference))
    assert not absent + unknown, f"tensors differ: absent {absent}, unknown {unknown}"
    largest: dict[str, Difference] = {}
    for shard in shards:
        initial = None if start is None else start[shard.name]
        difference = _difference(shard.tensors[kind], shard.where, reference[shard.name], initial)
        if shard.name not in largest or difference.error > largest[shard.name].error:
            largest[shard.name] = difference
    return [largest[name] for name in sorted(largest, key=_model_order, reverse=True)]


def _model_order(name: str) -> tuple[int, int, str]:
    """Sorts from the input of the model to its output."""
    parts = name.split(".")
    number = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
    return ({"embedding": 0, "blocks": 1}.get(parts[0], 2), number, name)


def _difference(values: Tensor, where: Rectangle, whole: Tensor, start: Tensor | None) -> Difference:
    ours, theirs = values.double(), whole[where.slices].double()
    scale = (whole.double() if start is None else whole.double() - start.double()).square().mean().sqrt()
    scale = scale.clamp(min=1e-30)
    error = float((ours - theirs).square().mean().sqrt() / scale)
    if error == 0.0:
        return Difference(where.name, 0.0)
    ratio = float((ours * theirs).sum() / theirs.square().sum().clamp(min=1e-60))
    rest = float((ours - ratio * theirs).square().mean().sqrt() / scale)
    return Difference(where.name, error if error == error else float("inf"), ratio, rest)


def _stray_replicas(masters: dict[str, Tensor], live: Sequence[Shard]) -> list[str]:
    """Names of live parameters that are not the owner's master weights, rounded."""
    stray = set()
    for shard in live:
        parameter = shard.tensors["parameter"]
        if not torch.equal(masters[shard.name][shard.where.slices].to(parameter.dtype), parameter):
            stray.add(shard.name)
    return sorted(stray, key=_model_order)
