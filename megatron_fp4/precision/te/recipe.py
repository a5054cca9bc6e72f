"""The precision plan as a recipe for Transformer Engine's own modules, `te.Linear` under `te.autocast`.

A plan that is one uniform NVFP4 recipe from start to end becomes an `NVFP4BlockScaling`; every other becomes a
`CustomRecipe` whose factory looks the module's name up in the precision table. One object per plan and phase, because
TE's modules ignore a change between two recipes of a built-in class, and rebuild everything for a new custom one (traps
1 and 2 of docs/transformer_engine.md): at a switch of phases, give `te.autocast` the next phase's object and pass
`is_first_microbatch=True` to each module once.

Not here: what TE's modules decide themselves, whatever a recipe says. They set the amax groups, and the type of the
weight gradient follows from their `fuse_wgrad_accumulation`; a plan that says otherwise is refused.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_fp4.precision.config import ComputeDtype
from megatron_fp4.precision.operand import AmaxScope, Format, Operand, Rounding
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.recipes import nvfp4_paper
from megatron_fp4.precision.spec import LinearPrecision, WgradOutput
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.precision.te.api import Api, load_api
from megatron_fp4.precision.te.quantizers import TENSORS, directions, make_quantizer, one_quantizer
from megatron_fp4.precision.te.reference import reference_objections, with_reference
from megatron_fp4.precision.te.refusals import check_recipe

NOT_FROM_ENVIRONMENT = {
    "backward_override": None,
    "row_scaled_activation": False,
    "nvfp4_4over6": "none",
    "nvfp4_4over6_e4m3_use_256": "all",
    "nvfp4_4over6_err_mode": "MAE",
    "fp8_dpa": False,
    "fp8_mha": False,
}
"""Fields of TE's recipes that a plan never uses. Passed all the same: most have a default from an environment variable,
read when TE is imported (trap 4), which would change what is computed."""


def te_recipe(plan: PrecisionPlan, phase: int = 0, *, unsharded: bool = False, reference: bool = False) -> Any:
    """`NVFP4BlockScaling` or `CustomRecipe` of a phase of the plan; the same object each time.

    Modules must carry the logical names of the table: `te.Linear(..., name="blocks.3.mlp.up")`, and have
    `fuse_wgrad_accumulation=True` where weights have a `main_grad`. An evaluation (`evaluation: bf16`) runs outside of
    `te.autocast`. A `CustomRecipe` needs TE 2.19.

    unsharded: say that the modules run with tp = 1 and cp = 1, where amax_scope `tensor` and `shard` are one; otherwise
    only `shard` is taken, which is what TE's modules do in every layout. reference: a `CustomRecipe` with TE's
    pure-Python NVFP4 quantizer in the place of its kernels, for checks on any device; construct the modules without
    `fuse_wgrad_accumulation`, which its GEMM ignores.
    Raises ValueError, with the version and the remedy, for what the installed version cannot compute as the plan says.
    """
    return _recipe(plan, phase, unsharded, reference)


@functools.cache  # the identity of the result has a meaning: see above
def _recipe(plan: PrecisionPlan, phase: int, unsharded: bool, reference: bool) -> Any:
    api, table = load_api(), plan.table(phase)
    if plan.config.compute_dtype is not ComputeDtype.bf16:
        raise ValueError(
            f"precision.compute_dtype = {plan.config.compute_dtype.name}, but Transformer Engine's quantizers are used"
            f" with BF16 only; use bf16, with modules of params_dtype=torch.bfloat16"
        )
    for row in table.rows:
        check_recipe(row.name, row.precision, api.version, api.features)
        objections = [*_module_objections(row.precision, unsharded)]
        objections += reference_objections(row.precision) if reference else []
        for reason in objections:
            raise ValueError(f"{row.name}: {reason}. (te_recipe, Transformer Engine {api.version})")
    kinds = {_without_scope(row.precision) for row in table.rows}
    if len(kinds) == len(plan.phases) == 1 and not reference and (fields := _block_scaling_fields(kinds.pop())):
        return _make(api, "NVFP4BlockScaling", fields)
    if not api.features.mixed_directions:
        raise ValueError(
            f"te_recipe: modules of Transformer Engine {api.version} compute one uniform NVFP4 recipe from start to end"
            f" and nothing else; install transformer-engine>=2.19 (precision.backend=transformer_engine itself has no"
            f" such limit)"
        )
    factory = QuantizerFactory(with_reference(api) if reference else api, table)
    return _make(api, "CustomRecipe", {"qfactory": factory})


def _make(api: Api, name: str, fields: dict[str, Any]) -> Any:
    symbol = api.symbols[name]
    known = inspect.signature(symbol).parameters
    return symbol(**fields, **{key: value for key, value in NOT_FROM_ENVIRONMENT.items() if key in known})


class QuantizerFactory:
    """role -> TE quantizer. Compared by identity, as TE does with recipes."""

    def __init__(self, api: Api, table: PrecisionTable) -> None:
        self._api = api
        self._table = table.by_name

    def __call__(self, role: Any) -> Any:
        """role: a `QuantizerRole`, or None. Others than input, weight and grad_output (a module's outputs) are not
        quantized. Raises ValueError for a module that has no name of the precision table."""
        if role is None or role.tensor_type not in TENSORS:
            return self._identity()
        if role.name not in self._table:
            raise ValueError(
                f"a Transformer Engine module is named {role.name!r}, which is no linear of the precision plan;"
                f" construct it with name= one of {', '.join(list(self._table)[:4])}, ..."
            )
        row, column = directions(self._table[role.name], role.tensor_type)
        if one_quantizer(row, column):
            return make_quantizer(self._api, row, column)
        if not row.quantized and not column.quantized:
            return self._identity()
        return self._api.symbols["HybridQuantizer"](
            rowwise_quantizer=make_quantizer(self._api, row, None) if row.quantized else self._identity(),
            columnwise_quantizer=make_quantizer(self._api, None, column) if column.quantized else self._identity(),
        )

    def _identity(self) -> Any:
        return self._api.symbols["IdentityQuantizer"]()


def _module_objections(precision: LinearPrecision, unsharded: bool) -> Iterator[str]:
    """What a module decides, and a recipe cannot change."""
    for gemm in precision.gemms:
        for tensor, operand in zip(gemm.tensors, gemm.operands, strict=True):
            if operand.format is Format.nvfp4 and operand.amax_scope is AmaxScope.tensor and not unsharded:
                yield (
                    f"{gemm.name}.{tensor} has amax_scope tensor, but Transformer Engine's modules set the amax groups"
                    f" themselves and never reduce over the ranks that split a weight or a context; set amax_scope:"
                    f" shard (precision/recipe=nvfp4_shard), or, where tp = 1 and cp = 1, call te_recipe(plan,"
                    f" unsharded=True)"
                )
    if precision.wgrad_output is WgradOutput.compute:
        yield (
            "wgrad_output compute, but the type of a weight gradient follows from the module, not from its recipe; set"
            " wgrad_output: fp32 and construct te.Linear with fuse_wgrad_accumulation=True"
        )


def _block_scaling_fields(precision: LinearPrecision) -> dict[str, Any] | None:
    """The fields of an `NVFP4BlockScaling` that computes this, None if none does."""
    fields = {
        "disable_rht": not precision.wgrad.x.rht_size,
        "disable_stochastic_rounding": precision.dgrad.dy.rounding is not Rounding.sr,
        "disable_2d_quantization": precision.fprop.w.tile != (16, 16),
    }
    same = nvfp4_paper(
        rht=not fields["disable_rht"],
        stochastic=not fields["disable_stochastic_rounding"],
        square_weights=not fields["disable_2d_quantization"],
    )
    return fields if precision == same else None


def _without_scope(precision: LinearPrecision) -> LinearPrecision:
    """Both scopes are one here: see `_module_objections`."""

    def operand(value: Operand) -> Operand:
        return replace(value, amax_scope=AmaxScope.tensor) if value.quantized else value

    return precision.with_operands(operand)
