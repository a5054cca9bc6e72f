"""The precision plan as a recipe for Transformer Engine's own modules, `te.Linear` under `te.autocast`.

One idea: a plan that is one uniform NVFP4 recipe from start to end becomes an `NVFP4BlockScaling`; every other becomes
a `CustomRecipe` whose factory looks the module's name up in the precision table. One object per plan and phase, because
TE's modules ignore a change between two recipes of a built-in class, and rebuild everything for a new custom one (traps
1 and 2 of docs/transformer_engine.md): at a switch of phases, give `te.autocast` the next phase's object and pass
`is_first_microbatch=True` to each module once.

Not here: what TE's modules decide themselves. Amax of weights is never reduced over tensor-parallel ranks there
(amax_scope=shard), and the type of the weight gradient is the module's `fuse_wgrad_accumulation`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from megatron_fp4.precision.backends.transformer_engine import Api, load_api, make_quantizer, one_quantizer
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.spec import AmaxScope, Format, Gemm, LinearPrecision, Operand, Rounding, nvfp4_paper
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.precision.te_versions import check_recipe

STRING_ROLES = {"linear_input": "input", "linear_weight": "weight", "linear_grad_output": "grad_output"}


@functools.cache  # the identity of the result has a meaning: see above
def te_recipe(plan: PrecisionPlan, phase: int = 0) -> Any:
    """`NVFP4BlockScaling` or `CustomRecipe` of a phase of the plan; the same object each time.

    Modules must carry the logical names of the table: `te.Linear(..., name="blocks.3.mlp.up")`; linears that the table
    leaves in BF16 are either outside of `te.autocast`, or need TE 2.19. Raises ValueError, with the version and the
    remedy, for what the installed version cannot compute as the plan says.
    """
    api, table = load_api(), plan.table(phase)
    for row in table.rows:
        check_recipe(row.name, row.precision, api.version, api.features)
    kinds = {_without_scope(row.precision) for row in table.rows}
    if len(kinds) == len(plan.phases) == 1 and (fields := _block_scaling_fields(next(iter(kinds)))) is not None:
        return api.symbols["NVFP4BlockScaling"](**fields, fp8_dpa=False, fp8_mha=False)
    if not api.features.role_objects and len(kinds) > 1:
        raise ValueError(
            f"Transformer Engine {api.version} tells a custom recipe's factory no module names, so all linears would"
            f" get one precision, but the plan has {len(kinds)}; install transformer-engine>=2.19 (names came in 2.16),"
            f" or give the modules of each precision their own te.autocast and plan"
        )
    for row in table.rows:
        _check_directions(row.name, row.precision, api)
    return api.symbols["CustomRecipe"](qfactory=QuantizerFactory(api, table), fp8_dpa=False, fp8_mha=False)


class QuantizerFactory:
    """role -> TE quantizer. Compared by identity, as TE does with recipes."""

    def __init__(self, api: Api, table: PrecisionTable) -> None:
        self._api = api
        self._table = table.by_name

    def __call__(self, role: Any) -> Any:
        """Roles other than input, weight and grad_output (a module's outputs) are not quantized."""
        if isinstance(role, str):
            name, kind = next(iter(self._table)), STRING_ROLES.get(role, "")
        else:
            name, kind = (role.name, role.tensor_type) if role is not None else ("", "")
        if kind not in STRING_ROLES.values():
            return self._outside()
        if name not in self._table:
            raise ValueError(
                f"a Transformer Engine module is named {name!r}, which is no linear of the precision plan; construct it"
                f" with name= one of {', '.join(list(self._table)[:4])}, ..."
            )
        row, column = directions(self._table[name], kind)
        return self._quantizer(row, column)

    def _quantizer(self, row: Operand, column: Operand) -> Any:
        if one_quantizer(row, column):
            return make_quantizer(self._api, row, column)
        symbols = self._api.symbols
        if not row.quantized and not column.quantized:
            return symbols["IdentityQuantizer"]()
        parts = {
            "rowwise_quantizer": make_quantizer(self._api, row, None) if row.quantized else None,
            "columnwise_quantizer": make_quantizer(self._api, None, column) if column.quantized else None,
        }
        return symbols["HybridQuantizer"](**{k: q or symbols["IdentityQuantizer"]() for k, q in parts.items()})

    def _outside(self) -> Any:
        if self._api.features.mixed_directions:
            return self._api.symbols["IdentityQuantizer"]()
        if self._api.features.role_objects:  # 2.16 to 2.18 want an object; it is not used for a plain output
            return make_quantizer(self._api, Operand(Format.nvfp4), Operand(Format.nvfp4))
        return None


def directions(precision: LinearPrecision, kind: str) -> tuple[Operand, Operand]:
    """(row-wise, column-wise) operands of the input, weight or grad_output of a linear."""
    fprop, dgrad, wgrad = precision.fprop, precision.dgrad, precision.wgrad
    return {"input": (fprop.a, wgrad.b), "weight": (fprop.b, dgrad.b), "grad_output": (dgrad.a, wgrad.a)}[kind]


def _check_directions(name: str, precision: LinearPrecision, api: Api) -> None:
    """Before 2.19 both directions of a tensor come from one quantizer (trap 13)."""
    if api.features.mixed_directions:
        return
    for kind in STRING_ROLES.values():
        row, column = directions(precision, kind)
        if not one_quantizer(row, column):
            raise ValueError(
                f"{name}: its {kind} is quantized differently for two GEMMs, or not at all, which modules of"
                f" Transformer Engine {api.version} cannot do; install transformer-engine>=2.19, or use this linear"
                f" outside of te.autocast (precision.backend=transformer_engine itself has no such limit)"
            )


def _block_scaling_fields(precision: LinearPrecision) -> dict[str, bool] | None:
    """The fields of an `NVFP4BlockScaling` that computes this, None if none does. All are passed: trap 4."""
    fields = {
        "disable_rht": not precision.wgrad.a.rht_size,
        "disable_stochastic_rounding": precision.dgrad.a.rounding is not Rounding.sr,
        "disable_2d_quantization": precision.fprop.b.tile != (16, 16),
    }
    same = nvfp4_paper(
        rht=not fields["disable_rht"],
        stochastic=not fields["disable_stochastic_rounding"],
        square_weights=not fields["disable_2d_quantization"],
    )
    return fields if replace(precision, wgrad_output=same.wgrad_output) == same else None


def _without_scope(precision: LinearPrecision) -> LinearPrecision:
    """Both scopes are one here: the amax groups are the module's."""

    def operand(value: Operand) -> Operand:
        return replace(value, amax_scope=AmaxScope.tensor) if value.quantized else value

    def gemm(value: Gemm) -> Gemm:
        return Gemm(operand(value.a), operand(value.b))

    return LinearPrecision(gemm(precision.fprop), gemm(precision.dgrad), gemm(precision.wgrad), precision.wgrad_output)
