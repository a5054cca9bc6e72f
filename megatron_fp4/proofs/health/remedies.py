"""What may keep a GEMM from making zeros, the cheapest first, and how the product's configuration says it.

    1x16 weights     a scale per row of a tile: a weak channel no longer shares one with strong ones. Both directions:
                     weights of Fprop and Dgrad then have different codes, which the paper avoids by 16x16 tiles
    mxfp8            that GEMM alone in E4M3 with a scale per 32, whose elements reach 448 * 2^9 below a block's maximum
    bf16             that GEMM alone in BF16

Not here: which of them helps (examine.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from megatron_fp4.precision.config import GEMMS, HIGH, PrecisionConfig, Rule
from megatron_fp4.precision.operand import Format, Operand
from megatron_fp4.precision.plan import matches, ordered_rules
from megatron_fp4.precision.recipes import mxfp8
from megatron_fp4.precision.spec import Gemm, LinearPrecision
from megatron_fp4.precision.table import PrecisionTable

MXFP8 = "mxfp8"


@dataclass(frozen=True)
class Remedy:
    """Another precision for some linears. recipe: its name, and `value` where the configuration must say what it is;
    gemm: the one that it is for, "" for all three."""

    label: str
    recipe: str
    value: LinearPrecision | None
    gemm: str = ""


def remedies(precision: LinearPrecision, gemm: str, base: str) -> list[Remedy]:
    """What may help a linear of this precision whose `gemm` makes zeros. base: name of its recipe."""
    of_gemm: Gemm = getattr(precision, gemm)
    weights = [operand for name, operand in zip(of_gemm.tensors, of_gemm.operands, strict=True) if name == "w"]
    listed: list[Remedy] = []
    if any(weight.tile == (16, 16) for weight in weights):
        fprop = replace(precision.fprop, w=_in_rows(precision.fprop.w))
        dgrad = replace(precision.dgrad, w=_in_rows(precision.dgrad.w))
        listed.append(Remedy("1x16 weights", f"{base}_1x16", replace(precision, fprop=fprop, dgrad=dgrad)))
    if any(operand.format not in (Format.mxfp8, Format.bf16) for operand in of_gemm.operands):
        listed.append(Remedy(f"mxfp8 for {gemm}", MXFP8, mxfp8(), gemm))
    return [*listed, Remedy(f"bf16 for {gemm}", HIGH, None, gemm)]


def _in_rows(weight: Operand) -> Operand:
    return replace(weight, tile=(1, 16)) if weight.tile == (16, 16) else weight


def pattern_for(names: Sequence[str], others: Sequence[str]) -> str:
    """What matches exactly `names`: a glob with a star for each number, or an expression with these numbers.

    names: of one place in different blocks. others: linears that it may not match.
    """
    if len(names) == 1:
        return names[0]
    glob = re.sub(r"(?<=\.)\d+(?=\.)", "*", names[0])
    if not any(matches(glob, other) for other in others) and all(matches(glob, name) for name in names):
        return glob
    parts = [re.split(r"(?<=\.)(\d+)(?=\.)", name) for name in names]
    if len({len(one) for one in parts}) == 1 and len(parts[0]) == 3:
        before, _, behind = (re.escape(part) for part in parts[0])
        return f"/^{before}({'|'.join(one[1] for one in parts)}){behind}$/"
    return f"/^({'|'.join(re.escape(name) for name in names)})$/"


def rule_for(pattern: str, chosen: Sequence[Remedy], bases: Mapping[str, str]) -> Rule:
    """All remedies of some linears in one rule. bases: by GEMM, the recipe that they compute it in now."""
    whole = [remedy.recipe for remedy in chosen if not remedy.gemm]
    names = {gemm: whole[0] if whole else base for gemm, base in bases.items()}
    names |= {remedy.gemm: remedy.recipe for remedy in chosen if remedy.gemm}
    use = max(names.values(), key=list(names.values()).count)
    return Rule(pattern, use=use, **{gemm: name for gemm, name in names.items() if name != use})


def base_recipes(config: PrecisionConfig, precision: LinearPrecision) -> dict[str, str]:
    """GEMM -> the name of a recipe of the run in which it is computed as in `precision`."""

    def name(gemm: str) -> str:
        wanted = getattr(precision, gemm)
        named = {HIGH: LinearPrecision(), **config.recipes}
        preferred = sorted(named, key=lambda one: one != config.use)
        return next((one for one in preferred if getattr(named[one], gemm) == wanted), HIGH)

    return {gemm: name(gemm) for gemm in GEMMS}


def with_rules(
    config: PrecisionConfig, rules: Sequence[Rule], recipes: Mapping[str, LinearPrecision], table: PrecisionTable
) -> PrecisionConfig:
    """The rules before those that there are; one of these that decided only over linears which the new ones take is
    left out. table: what the present rules come to."""
    left = {row.reason for row in table.rows if not any(matches(rule.match, row.name) for rule in rules)}
    labelled = ordered_rules(config)
    kept = [rule for label, rule in labelled if label in left and any(rule is one for one in config.rules)]
    return replace(config, rules=[*rules, *kept], recipes={**config.recipes, **recipes})


def as_yaml(rules: Sequence[Rule], recipes: Mapping[str, LinearPrecision]) -> str:
    """What to write under `precision`, in the product's syntax."""
    lines = ["precision:"]
    if recipes:
        lines.append("  recipes:")
        for name, recipe in recipes.items():
            lines.append(f"    {name}:")
            for gemm in recipe.gemms:
                operands = [
                    f"{tensor}: {_flow(operand)}" for tensor, operand in zip(gemm.tensors, gemm.operands, strict=True)
                ]
                pad = ["pad: true"] if gemm.pad else []
                lines.append(f"      {gemm.name}: {{{', '.join([*operands, *pad])}}}")
            if recipe.wgrad_output != LinearPrecision().wgrad_output:
                lines.append(f"      wgrad_output: {recipe.wgrad_output.name}")
    lines.append("  rules:  # before those that there are")
    lines += [f"    - {_flow(rule, quoted=('match',))}" for rule in rules]
    return "\n".join(lines)


def _flow(value: Operand | Rule, quoted: tuple[str, ...] = ()) -> str:
    """The settings that are not at their defaults, as a mapping on one line."""
    default = type(value)()
    parts = []
    for setting in fields(value):
        one: Any = getattr(value, setting.name)
        if one == getattr(default, setting.name) and setting.name != "use":
            continue
        if setting.name == "tile" and one[0] == 1:
            continue
        text = one.name if isinstance(one, Enum) else list(one) if isinstance(one, tuple) else one
        parts.append(f"{setting.name}: '{text}'" if setting.name in quoted else f"{setting.name}: {text}")
    return "{" + ", ".join(parts) + "}"
