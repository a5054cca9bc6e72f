"""Which parameters Muon updates, and why not the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_fp4.comm.parameter import LogicalParameter
from megatron_fp4.optim.config import Algorithm, OptimConfig
from megatron_fp4.optim.muon.config import MuonConfig

ROUTER = "*.router.weight"
"""Matrices whose rows are experts, each with a scale that says how often it is chosen."""


@dataclass(frozen=True)
class Updater:
    """Who updates a logical tensor. muon: else AdamW. reason: in words, for the table that a run prints."""

    muon: bool
    reason: str


def choose(name: str, shape: Sequence[int], config: OptimConfig) -> Updater:
    """Who updates the logical tensor of this name and shape."""
    if config.algorithm is not Algorithm.muon:
        return Updater(False, "optim.algorithm=adamw")
    if len(shape) != 2:
        return Updater(False, "no matrix")
    if fnmatchcase(name, ROUTER):
        return Updater(False, "a router")
    for pattern in config.muon.adamw_for:
        if fnmatchcase(name, pattern):
            return Updater(False, f"optim.muon.adamw_for: {pattern}")
    return Updater(True, "a matrix")


def check_patterns(names: Collection[str], config: OptimConfig) -> None:
    """Raises ValueError for a pattern of `adamw_for` that fits none of these logical tensors; the defaults may."""
    for pattern in config.muon.adamw_for if config.algorithm is Algorithm.muon else ():
        if pattern not in MuonConfig().adamw_for and not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"optim.muon.adamw_for: {pattern!r} fits no weight of this model; they are called"
                f" {', '.join(sorted(names)[:4])}, ..."
            )


def is_muons(parameter: LogicalParameter, config: OptimConfig) -> bool:
    """Whether Muon updates all matrices of a local parameter; raises ValueError if only some of a fused one's."""
    rectangles = parameter.placement.rectangles
    chosen = {where.name: choose(where.name, where.global_shape, config).muon for where in rectangles}
    if len(set(chosen.values())) > 1:
        names = {muon: [name for name, by_muon in chosen.items() if by_muon is muon] for muon in (True, False)}
        raise ValueError(
            f"optim.muon.adamw_for names {', '.join(names[False])}, which one weight holds together with"
            f" {', '.join(names[True])}; name all of them or none"
        )
    return all(chosen.values()) and parameter.placement.decay


def matrices_of(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> dict[str, tuple[int, int]]:
    """The logical tensors, by name, that Muon updates."""
    return {name: (shape[0], shape[1]) for name, shape in shapes.items() if choose(name, shape, config).muon}


def state_bytes(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> int:
    """Bytes of a checkpoint of these logical tensors: FP32 masters and moments, of which the weights are made."""
    return sum(4 * math.prod(shape) * (2 if choose(name, shape, config).muon else 3) for name, shape in shapes.items())


def choice_table(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> list[str]:
    """Lines for a user: logical tensors by who updates them and why, blocks of a kind together, with their number."""
    lines: dict[tuple[bool, str], dict[str, int]] = {}
    for name, shape in shapes.items():
        choice = choose(name, shape, config)
        kinds = lines.setdefault((not choice.muon, choice.reason), {})
        kind = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        kinds[kind] = kinds.get(kind, 0) + 1
    return [
        f"{'adamw' if adamw else 'muon':<6} {reason:<34} " + ", ".join(f"{kind} ({n})" for kind, n in kinds.items())
        for (adamw, reason), kinds in sorted(lines.items())
    ]
