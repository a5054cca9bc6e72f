"""Which GEMMs make exact zeros in a checkpoint's weight gradients, and the rules that end it, tried on the same batch.

Remedies are tried from the cheapest on: all at once, then the next one for whatever still makes zeros, until nothing
does or nothing is left to try. What is advised is what was measured last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_fp4.precision.config import PrecisionConfig, Rule
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.precision.table import PrecisionTable, Row
from megatron_fp4.proofs.health.patient import Patient
from megatron_fp4.proofs.health.remedies import Remedy, base_recipes, pattern_for, remedies, rule_for, with_rules
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.telemetry.monitors.zeros import LinearHealth

THRESHOLD = 0.01
"""Part of a weight gradient that one GEMM may make zero before it is an illness. More than half of it was seen in a
sound model, by Wgrad of second linears, whose x squared ReLU makes sparse."""


@dataclass
class Illness:
    """A GEMM that makes zeros, in linears of one place in the blocks and of one precision.

    victims: the linears whose gradients have these zeros. before, after: their zeros by this GEMM. elements: of these
    gradients. left: remedies that have not failed, the first of which was tried last; empty where none can be computed.
    """

    names: list[str]
    gemm: str
    victims: list[str]
    before: int
    elements: int
    left: list[Remedy]
    after: int = 0

    @property
    def remedy(self) -> Remedy | None:
        return self.left[0] if self.left else None


@dataclass(frozen=True)
class Examination:
    """now, bf16, after: the same gradient by the run's precision, without quantization, and by the advice (None where
    nothing was found). rules, recipes: the advice. replaced: matches of the run's rules that no longer decide. still:
    (linear, GEMM) that make zeros by the advice too."""

    now: list[LinearHealth]
    bf16: list[LinearHealth]
    after: list[LinearHealth] | None = None
    illnesses: list[Illness] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    recipes: dict[str, LinearPrecision] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    still: list[tuple[str, str]] = field(default_factory=list)

    def unfollowed(self, threshold: float) -> list[str]:
        """Linears at no activation with more zeros than in BF16 that no GEMM is charged with: channels are not followed
        through attention and the state space."""
        return [
            one.name
            for one, base in zip(self.now, self.bf16, strict=True)
            if not one.first and one.zeros - one.underflow - base.zeros > threshold * one.numel
        ]


def examine(patient: Patient, threshold: float = THRESHOLD) -> Examination:
    """Collective over the ranks of the patient."""
    plan = patient.checked.plan
    table = plan.table(patient.phase)
    nothing_quantized = PrecisionTable(tuple(Row(row.name, LinearPrecision(), "bf16") for row in table.rows))
    bf16, now = patient.gradient(nothing_quantized), patient.gradient(table)
    illnesses = _illnesses(patient, table, now, _makers(now, threshold))
    if not illnesses:
        return Examination(now, bf16)
    while True:
        treated = _treat(patient, illnesses)
        after = patient.gradient(treated.table)
        still = _makers(after, threshold)
        for illness in illnesses:
            illness.after = sum(_zeros(one, illness) for one in after)
        worse = [one for one in illnesses if len(one.left) > 1 and any((name, one.gemm) in still for name in one.names)]
        known = {(name, one.gemm) for one in illnesses for name in one.names}
        new = _illnesses(patient, table, after, [maker for maker in still if maker not in known])
        if not worse and not new:
            return Examination(now, bf16, after, illnesses, treated.rules, treated.recipes, treated.replaced, still)
        for illness in worse:
            illness.left.pop(0)
        illnesses += new  # what only shows behind another, such as Wgrad of channels that Dgrad had lost


@dataclass(frozen=True)
class _Treated:
    table: PrecisionTable
    rules: list[Rule]
    recipes: dict[str, LinearPrecision]
    replaced: list[str]


def _treat(patient: Patient, illnesses: Sequence[Illness]) -> _Treated:
    """The precision with the first remedy that each illness has left. Raises ValueError as a run with it would."""
    config, plan = patient.checked.config, patient.checked.plan
    rules, recipes = _advice(config.precision, plan.table(patient.phase), illnesses)
    precision = with_rules(config.precision, rules, recipes, plan.table())
    checked = check_config(replace(config, precision=precision), patient.run.mesh.world.size)
    replaced = [rule.match for rule in config.precision.rules if not any(rule is one for one in precision.rules)]
    return _Treated(checked.plan.table(patient.phase), rules, recipes, replaced)


def _advice(
    config: PrecisionConfig, table: PrecisionTable, illnesses: Sequence[Illness]
) -> tuple[list[Rule], dict[str, LinearPrecision]]:
    """A rule for the linears of one place that get the same remedies, and the recipes that these need."""
    chosen: dict[str, tuple[Remedy, ...]] = {}
    for illness in illnesses:
        for name in illness.names if illness.remedy else ():
            chosen[name] = (*chosen.get(name, ()), *illness.left[:1])
    groups: dict[tuple[str, tuple[Remedy, ...], LinearPrecision], list[str]] = {}
    for name, some in chosen.items():
        groups.setdefault((_place(name), some, table[name]), []).append(name)
    rules = []
    for (_, some, precision), names in groups.items():
        others = [row.name for row in table.rows if row.name not in names and not row.reason.startswith("keep_bf16")]
        rules.append(rule_for(pattern_for(names, others), some, base_recipes(config, precision)))
    recipes = {one.recipe: one.value for some in chosen.values() for one in some if one.value}
    return rules, {name: value for name, value in recipes.items() if name not in config.recipes}


def _illnesses(
    patient: Patient, table: PrecisionTable, now: Sequence[LinearHealth], makers: Sequence[tuple[str, str]]
) -> list[Illness]:
    """One for each place, GEMM and precision, with the remedies that the shapes allow."""
    config = patient.checked.config.precision
    by_name, groups = {one.name: one for one in now}, dict[tuple[str, str, LinearPrecision], list[str]]()
    for name, gemm in makers:
        groups.setdefault((_place(name), gemm, table[name]), []).append(name)
    illnesses = []
    for (_, gemm, precision), names in groups.items():
        base = base_recipes(config, precision)["fprop"]
        illness = Illness(names, gemm, [], 0, 0, [])
        illness.victims += [one.name for one in now if _zeros(one, illness)]
        illness.before = sum(_zeros(one, illness) for one in now)
        illness.elements = sum(by_name[name].numel for name in illness.victims)
        illness.left = [one for one in remedies(precision, gemm, base) if _fits(patient, illness, one)]
        illnesses.append(illness)
    return illnesses


def _fits(patient: Patient, illness: Illness, remedy: Remedy) -> bool:
    """Whether a run could have it: tiles divide its shapes, its backend can compute it."""
    try:
        _treat(patient, [replace(illness, left=[remedy])])
    except ValueError:
        return False
    return True


def _makers(linears: Sequence[LinearHealth], threshold: float) -> list[tuple[str, str]]:
    """(linear, GEMM) that make more zeros of some gradient than the threshold, in the model's order."""
    return list(
        dict.fromkeys(maker for one in linears for maker, count in one.makers() if count > threshold * one.numel)
    )


def _zeros(victim: LinearHealth, illness: Illness) -> int:
    return sum(count for (name, gemm), count in victim.makers() if name in illness.names and gemm == illness.gemm)


def _place(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)
