"""Which linear computes in which precision, and when.

Precision is a table `linear name -> LinearPrecision`, made from ordered rules (first match wins) and, for runs that
change precision on the way, one such table per phase of consumed tokens. A rule or switch without effect is an error:
configuration cannot silently do nothing. Linears are known by name, block number and shape.

Not here: the table as text (table.py), its assignment to the layers of a model (layers/linear.py).
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from megatron_fp4.precision.config import GEMMS, SAME, BackendName, PrecisionConfig, Rule, Switch, regular_expression
from megatron_fp4.precision.grouped.scales import check_expert_scales
from megatron_fp4.precision.spec import Gemm, LinearPrecision
from megatron_fp4.precision.table import PrecisionTable, Row, describe, difference, gemm_format


class Linear(Protocol):
    """What the plan reads of a linear (models.block.LinearInfo)."""

    @property
    def name(self) -> str: ...
    @property
    def block(self) -> int | None: ...
    @property
    def outputs(self) -> dict[str, int]: ...
    @property
    def num_experts(self) -> int: ...
    def local_shape(self, tp: int) -> tuple[int, int]: ...
    def local_outputs(self, tp: int) -> list[int]: ...
    def local_rows(self, tokens: int, tp: int) -> int: ...


def matches(pattern: str, name: str) -> bool:
    """Glob, or regular expression between slashes."""
    expression = regular_expression(pattern)
    if expression is not None:
        return re.search(expression, name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def selected_blocks(spec: str, num_blocks: int) -> set[int]:
    """Block numbers that `blocks` selects. Raises ValueError if the text is none of the forms."""
    if match := re.fullmatch(r"(first|last):(\d+)", spec):
        count = min(int(match[2]), num_blocks)
        first = 0 if match[1] == "first" else num_blocks - count
        return set(range(first, first + count))
    if match := re.fullmatch(r"(-?\d*):(-?\d*)", spec):
        start, stop = (int(part) if part else None for part in match.groups())
        return set(range(num_blocks)[slice(start, stop)])
    raise ValueError(f"precision rule: blocks = {spec!r}; use 'first:2', 'last:8' or a slice such as '-8:'")


def ordered_rules(config: PrecisionConfig) -> list[tuple[str, Rule]]:
    """(label, rule) in the order in which they decide: what is kept in BF16, the rules, the recipe of the rest."""
    rules = [
        (f"rule {number}: {rule.match}" + (f" blocks {rule.blocks}" if rule.blocks else ""), rule)
        for number, rule in enumerate(config.rules, start=1)
    ]
    if not config.use:
        return rules or [("nothing is quantized", Rule())]
    keep = config.keep_bf16
    kept = [("keep_bf16 head", Rule("head"))] if keep.head else []
    kept += [(f"keep_bf16 first:{keep.first}", Rule(blocks=f"first:{keep.first}"))] if keep.first else []
    kept += [(f"keep_bf16 last:{keep.last}", Rule(blocks=f"last:{keep.last}"))] if keep.last else []
    return [*kept, *rules, (f"use: {config.use}", Rule(use=config.use))]


def base_table(config: PrecisionConfig, linears: Sequence[Linear]) -> PrecisionTable:
    """Apply the rules. Raises ValueError for a rule without effect and for a linear that no rule names."""
    num_blocks = 1 + max((info.block for info in linears if info.block is not None), default=-1)
    rows: dict[str, Row] = {}
    for label, rule in ordered_rules(config):
        config.recipe(
            config.use if rule.use == SAME else rule.use
        )  # also where fprop, dgrad and wgrad replace it: a name that none has is a slip
        blocks = selected_blocks(rule.blocks, num_blocks) if rule.blocks else None
        names = [
            info.name
            for info in linears
            if info.name not in rows and matches(rule.match, info.name) and (blocks is None or info.block in blocks)
        ]
        if not names and label.startswith("rule"):
            raise ValueError(
                f"precision {label} matches no linear that an earlier rule has not taken and keep_bf16 does not keep;"
                f" remove it, or mend its pattern (a name looks like {linears[0].name!r}; the model has {num_blocks}"
                f" blocks)"
            )
        precision = _combine(config, [config.name_in(rule, gemm) for gemm in GEMMS])
        rows.update({name: Row(name, precision, label) for name in names})
    missing = [info.name for info in linears if info.name not in rows]
    if missing:
        raise ValueError(
            f"no precision rule matches {', '.join(missing)}; set precision.use, or end the rules with a rule for '*'"
        )
    return PrecisionTable(tuple(rows[info.name] for info in linears))


def _combine(config: PrecisionConfig, names: Sequence[str]) -> LinearPrecision:
    fprop, dgrad, wgrad = (config.recipe(name) for name in names)
    return LinearPrecision(fprop.fprop, dgrad.dgrad, wgrad.wgrad, wgrad.wgrad_output)


class PrecisionPlan:
    """The tables of a run: one from its start, one more from each switch on.

    Raises ValueError for rules or switches without effect, and where quantization is asked for but no GEMM uses it.
    """

    def __init__(
        self, config: PrecisionConfig, linears: Sequence[Linear], *, total_tokens: int = 0, decay_start: int = 0
    ) -> None:
        self.config = config
        if config.evaluation != SAME:
            config.recipe(config.evaluation)
        if config.backend is BackendName.transformer_engine:
            _refuse_padding(config)
        table = base_table(config, linears)
        if config.recipes and table.num_quantized_gemms == 0 and any(r.quantized for r in config.recipes.values()):
            asked = ", ".join(config.recipes)
            raise ValueError(
                f"precision recipe(s) {asked} are configured, but the rules leave every GEMM in bf16; change"
                f" precision.keep_bf16, precision.rules or precision.use"
            )
        self.phases: list[tuple[int, PrecisionTable]] = [(0, table)]
        for switch in sorted(config.switch, key=lambda one: one.starts_at(total_tokens, decay_start)):
            start = switch.starts_at(total_tokens, decay_start)
            if total_tokens and start >= total_tokens:
                raise ValueError(f"precision.switch at {start} tokens lies beyond the end of the run, {total_tokens}")
            table = self._switched(table, switch)
            self.phases.append((start, table))
        for label, table in self.labelled_tables():
            check_expert_scales(label, table, linears)

    def _switched(self, table: PrecisionTable, switch: Switch) -> PrecisionTable:
        recipe = self.config.recipe(switch.use)
        rows = []
        for row in table.rows:
            if matches(switch.match, row.name):
                fprop, dgrad, wgrad = (recipe if gemm in switch.gemms else row.precision for gemm in GEMMS)
                precision = LinearPrecision(fprop.fprop, dgrad.dgrad, wgrad.wgrad, wgrad.wgrad_output)
                if precision != row.precision:
                    row = Row(row.name, precision, f"{row.reason}; switch to {switch.use}")
            rows.append(row)
        if tuple(rows) == table.rows:
            what = f"match {switch.match!r}, use {switch.use}"
            raise ValueError(f"precision.switch ({what}) changes no GEMM; remove it")
        return PrecisionTable(tuple(rows))

    def phase_at(self, consumed_tokens: int) -> int:
        """Index of the phase in which a step that starts after `consumed_tokens` computes."""
        return max(index for index, (start, _) in enumerate(self.phases) if consumed_tokens >= start)

    def phase_before(self, consumed_tokens: int, texts: Mapping[str, Any]) -> int:
        """Index of the phase in which the step computed that ended at `consumed_tokens`: that whose table was stored.

        texts: what was stored, `PrecisionTable.texts`. It is not the phase at these tokens where the next step would be
        the first of another.
        """
        phase = self.phase_at(max(0, consumed_tokens - 1))
        stored = [number for number in range(len(self.phases)) if self.table(number).texts() == texts]
        return min(stored, key=lambda number: abs(number - phase), default=phase)

    def table(self, phase: int = 0) -> PrecisionTable:
        return self.phases[phase][1]

    def evaluation_table(self, phase: int = 0) -> PrecisionTable:
        """Precision of an evaluation during `phase`: of a recipe that is named for it, only Fprop is multiplied."""
        if self.config.evaluation == SAME:
            return self.table(phase)
        precision = LinearPrecision(self.config.recipe(self.config.evaluation).fprop)
        return PrecisionTable(tuple(Row(row.name, precision, "evaluation") for row in self.table(phase).rows))

    def labelled_tables(self) -> Iterator[tuple[str, PrecisionTable]]:
        """Every table that the run may compute by, and what errors begin with: "" for those of training."""
        yield from (("", table) for _, table in self.phases)
        if self.config.evaluation != SAME:
            yield f"precision.evaluation={self.config.evaluation}, ", self.evaluation_table()

    def describe(self) -> str:
        """The table at the start, the recipes in words, and what changes at each switch."""
        lines = [describe(self.table())]
        named = {self.config.name_in(rule, gemm) for _, rule in ordered_rules(self.config) for gemm in GEMMS}
        named |= {switch.use for switch in self.config.switch}
        lines += [f"recipe {name}: {recipe}" for name, recipe in self.config.recipes.items() if name in named]
        for (_, before), (start, after) in itertools.pairwise(self.phases):
            lines += [f"from {start:,} consumed tokens on:", *difference(before.texts(), after.texts())]
        return "\n".join(lines)

    def check_shapes(self, linears: Sequence[Linear], *, tp: int, tokens: int) -> None:
        """Raises ValueError, before anything is built, for a local shape that a quantized GEMM cannot take.

        tp: tensor-parallel size. tokens: rows of one microbatch on a rank (micro batch * sequence / cp).
        """
        misfits = [
            (label, info, gemm, text)
            for label, table in self.labelled_tables()
            for info in linears
            for gemm, text in _misfits(info, table[info.name], tp, tokens)
        ]
        if not misfits:
            return
        label, info, gemm, text = misfits[0]
        remedy = "evaluate in another precision" if label else "leave this linear in bf16 by a precision rule"
        if self.config.backend is not BackendName.transformer_engine:
            remedy += f", or pad with zeros: {' '.join(self._padding({misfit[2] for misfit in misfits}))}"
        if any(of(tp) != of(1) for of in (info.local_shape, lambda size: info.local_rows(tokens, size))):
            remedy = f"use a smaller tp, {remedy}"
        raise ValueError(f"{label}{info.name}: {gemm.name} in {text}; change the size, {remedy}")

    def _padding(self, gemms: set[Gemm]) -> list[str]:
        """The overrides by which these GEMMs pad."""
        return [
            f"precision.recipes.{name}.{gemm.name}.pad=true"
            for name, recipe in self.config.recipes.items()
            for gemm in recipe.gemms
            if gemm in gemms
        ]


def _refuse_padding(config: PrecisionConfig) -> None:
    for name, recipe in config.recipes.items():
        if any(gemm.pad for gemm in recipe.gemms):
            raise ValueError(
                f"precision.recipes.{name}: pad with backend=transformer_engine, which refuses shapes that its tiles do"
                f" not divide; remove it and change the shapes, or use backend=emulated"
            )


def _misfits(info: Linear, precision: LinearPrecision, tp: int, tokens: int) -> Iterator[tuple[Gemm, str]]:
    """The quantized GEMMs that cannot take the local shape of a linear, and what each would need."""
    _, columns = info.local_shape(tp)
    tokens = info.local_rows(tokens, tp)
    sizes = {
        "T": ([tokens], "tokens per microbatch and rank"),
        "N": (info.local_outputs(tp), "output features per rank"),
        "K": ([columns], "input features per rank"),
    }
    where = ", ".join([f"tp = {tp}", f"parts {dict(info.outputs)}", *([f"{tokens} tokens"] if tokens else [])])
    for gemm in precision.gemms:
        for dim, multiple in ({} if gemm.pad else gemm.multiples()).items():
            for size in sizes[dim][0]:
                if size % multiple:
                    yield (
                        gemm,
                        f"{gemm_format(gemm)} needs {sizes[dim][1]} to be a multiple of {multiple}, got {size}"
                        f" ({where})",
                    )
