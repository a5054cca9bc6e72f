"""The resolved precision of every linear of a model, and how it is shown to people.

A table is printed at start, stored with the run, compared on resume, and assigned to linears.

Not here: the rules that it is made from (plan.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_fp4.comm.agree import number_ranges
from megatron_fp4.precision.operand import AmaxScope, Format
from megatron_fp4.precision.spec import Gemm, LinearPrecision


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    """Logical name of the linear, such as blocks.3.mlp.up."""
    precision: LinearPrecision
    reason: str
    """The rule that decided, for people."""


@dataclass(frozen=True)
class PrecisionTable:
    """The resolved precision of every linear of the whole model."""

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> LinearPrecision:
        return self.by_name[name]

    @functools.cached_property
    def by_name(self) -> dict[str, LinearPrecision]:
        return {row.name: row.precision for row in self.rows}

    def formats(self) -> dict[str, tuple[str, str, str]]:
        """Name -> formats of fprop, dgrad, wgrad."""
        return {row.name: gemm_formats(row.precision) for row in self.rows}

    def texts(self) -> dict[str, str]:
        """Name -> precision in words; what a run stores and a resume compares."""
        return {row.name: str(row.precision) for row in self.rows}

    @property
    def static_inputs(self) -> list[str]:
        """Linears whose input has a static scale in Fprop."""
        return [row.name for row in self.rows if row.precision.fprop.x.amax_scope is AmaxScope.static]

    @property
    def centred(self) -> bool:
        """Whether an operand of a linear is quantized without its mean."""
        return any(row.precision.centred for row in self.rows)

    @property
    def num_quantized_gemms(self) -> int:
        return sum(fmt != Format.bf16.name for formats in self.formats().values() for fmt in formats)


def gemm_format(gemm: Gemm) -> str:
    """`nvfp4`, `bf16`, or `mxfp8/nvfp4` where the operands differ."""
    first, second = (operand.format.name for operand in gemm.operands)
    return first if first == second else f"{first}/{second}"


def gemm_formats(precision: LinearPrecision) -> tuple[str, str, str]:
    """Formats of fprop, dgrad and wgrad."""
    return gemm_format(precision.fprop), gemm_format(precision.dgrad), gemm_format(precision.wgrad)


def describe(table: PrecisionTable) -> str:
    """The table as text: one line per group of blocks with equal precision, then the count and the reasons."""
    lines = [f"{'linear':<44} {'fprop':<10} {'dgrad':<10} {'wgrad':<10} decided by"]
    for names, row in _grouped(table):
        fprop, dgrad, wgrad = gemm_formats(row.precision)
        lines.append(f"{names:<44} {fprop:<10} {dgrad:<10} {wgrad:<10} {row.reason}")
    return "\n".join([*lines, summary(table)])


def summary(table: PrecisionTable) -> str:
    """`36 of 44 linears, 108 of 132 GEMMs in NVFP4; the rest BF16 because of keep_bf16 last:2 (24 GEMMs)`."""
    formats = table.formats()
    quantized = sum(any(fmt != Format.bf16.name for fmt in row) for row in formats.values())
    kinds = sorted({fmt for row in formats.values() for fmt in row if fmt != Format.bf16.name})
    text = (
        f"{quantized} of {len(formats)} linears, {table.num_quantized_gemms} of {3 * len(formats)} GEMMs in"
        f" {' and '.join(kinds).upper() or 'a quantized format'}"
    )
    reasons: dict[str, int] = {}
    for row in table.rows:
        count = gemm_formats(row.precision).count(Format.bf16.name)
        if count:
            reasons[row.reason] = reasons.get(row.reason, 0) + count
    if reasons:
        text += "; the rest BF16 because of " + ", ".join(f"{why} ({n} GEMMs)" for why, n in reasons.items())
    return text


def _grouped(table: PrecisionTable) -> list[tuple[str, Row]]:
    """The rows, those of different blocks that say the same joined as `blocks.{2-5}.mlp.up`."""
    groups: dict[tuple[str, LinearPrecision, str], list[int | None]] = {}
    first: dict[tuple[str, LinearPrecision, str], Row] = {}
    for row in table.rows:
        block, suffix = _split_name(row.name)
        key = (suffix, row.precision, row.reason)
        groups.setdefault(key, []).append(block)
        first.setdefault(key, row)
    return [(_group_name(key[0], blocks), first[key]) for key, blocks in groups.items()]


def _split_name(name: str) -> tuple[int | None, str]:
    """`blocks.3.mlp.up` -> (3, "mlp.up"); a name outside the blocks -> (None, name)."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _group_name(suffix: str, blocks: Sequence[int | None]) -> str:
    numbers = [block for block in blocks if block is not None]
    ranges = number_ranges(numbers) if len(numbers) == 1 else f"{{{number_ranges(numbers)}}}"
    return f"blocks.{ranges}.{suffix}" if numbers else suffix


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One line per group of linears whose precision differs, of two `PrecisionTable.texts`: the GEMMs that do.

    `blocks.{2-5}.mlp.up: fprop x nvfp4, w nvfp4 16x16 -> fprop x bf16, w bf16`
    """
    pairs = {name: (before.get(name, "absent"), text) for name, text in after.items()}
    return grouped({name: _changed_gemms(*pair) for name, pair in pairs.items() if pair[0] != pair[1]})


def grouped(texts: Mapping[str, str]) -> list[str]:
    """One line per group of linears of which `texts` says the same: `blocks.{2-5}.mlp.up: bf16`."""
    groups: dict[tuple[str, str], list[int | None]] = {}
    for name, text in texts.items():
        block, suffix = _split_name(name)
        groups.setdefault((suffix, text), []).append(block)
    return [f"{_group_name(suffix, blocks)}: {text}" for (suffix, text), blocks in groups.items()]


def _changed_gemms(before: str, after: str) -> str:
    left, right = before.split(" | "), after.split(" | ")
    if len(left) == len(right):
        changed = [number for number, gemm in enumerate(left) if gemm != right[number]]
        left, right = ([gemms[number] for number in changed] for gemms in (left, right))
    return f"{' | '.join(left)} -> {' | '.join(right)}"


def difference_to_stored(stored: Mapping[str, str | Sequence[str]], table: PrecisionTable) -> list[str]:
    """`difference` to what a checkpoint holds: texts, or, in older ones, the formats of the three GEMMs."""
    before = {name: text if isinstance(text, str) else " ".join(text) for name, text in stored.items()}
    after = table.texts()
    formats = {name: " ".join(row) for name, row in table.formats().items() if isinstance(stored.get(name, ""), list)}
    return difference(before, after | formats)
