"""The precision plan as a recipe for Transformer Engine's own modules, `te.Linear` under `te.autocast`.

One idea: a plan that is one uniform NVFP4 recipe from start to end becomes an `NVFP4BlockScaling`; every other becomes
a `CustomRecipe` whose factory looks the module's name up in the precision table. One object per plan and phase, because
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

from megatron_fp4.precision.backends.transformer_engine import Api, load_api, make_quantizer
from megatron_fp4.precision.config import GEMMS, ComputeDtype
from megatron_fp4.precision.operand import AmaxScope, Format, Operand, Rounding
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.recipes import nvfp4_paper
from megatron_fp4.precision.spec import Gemm, LinearPrecision, WgradOutput
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.precision.te.reference import reference_objections, with_reference
from megatron_fp4.precision.te.versions import TENSORS, check_recipe, directions, one_quantizer

STRING_ROLES = {"linear_input": "input", "linear_weight": "weight", "linear_grad_output": "grad_output"}
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
    `fuse_wgrad_accumulation=True` where weights have a `main_grad`; linears that the table leaves in BF16 are either
    outside of `te.autocast`, or need TE 2.19. An evaluation (`evaluation: bf16`) runs outside of `te.autocast`.

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
    if reference:
        api = with_reference(api)
    kinds = {_without_scope(row.precision) for row in table.rows}
    if len(kinds) == len(plan.phases) == 1 and (fields := _block_scaling_fields(next(iter(kinds)))) and not reference:
        return _make(api, "NVFP4BlockScaling", fields)
    if not api.features.role_objects and len(kinds) > 1:
        raise ValueError(
            f"Transformer Engine {api.version} tells a custom recipe's factory no module names, so all linears would"
            f" get one precision, but the plan has {len(kinds)}; install transformer-engine>=2.19 (names came in 2.16),"
            f" or give the modules of each precision their own te.autocast and plan"
        )
    for row in table.rows:
        _check_directions(row.name, row.precision, api)
    return _make(api, "CustomRecipe", {"qfactory": QuantizerFactory(api, table)})


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
        """Roles other than input, weight and grad_output (a module's outputs) are not quantized."""
        if isinstance(role, str):
            name, tensor = next(iter(self._table)), STRING_ROLES.get(role, "")
        else:
            name, tensor = (role.name, role.tensor_type) if role is not None else ("", "")
        if tensor not in TENSORS:
            return self._outside()
        if name not in self._table:
            raise ValueError(
                f"a Transformer Engine module is named {name!r}, which is no linear of the precision plan; construct it"
                f" with name= one of {', '.join(list(self._table)[:4])}, ..."
            )
        row, column = directions(self._table[name], tensor)
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


def _module_objections(precision: LinearPrecision, unsharded: bool) -> Iterator[str]:
    """What a module decides, and a recipe cannot change."""
    for name in GEMMS:
        gemm: Gemm = getattr(precision, name)
        for tensor, operand in zip(gemm.tensors, gemm.operands, strict=True):
            if operand.format is Format.nvfp4 and operand.amax_scope is AmaxScope.tensor and not unsharded:
                yield (
                    f"{name}.{tensor} has amax_scope tensor, but Transformer Engine's modules set the amax groups"
                    f" themselves and never reduce over the ranks that split a weight or a context; set amax_scope:"
                    f" shard (precision/recipe=nvfp4_shard), or, where tp = 1 and cp = 1, call te_recipe(plan,"
                    f" unsharded=True)"
                )
    if precision.wgrad_output is WgradOutput.compute:
        yield (
            "wgrad_output compute, but the type of a weight gradient follows from the module, not from its recipe; set"
            " wgrad_output: fp32 and construct te.Linear with fuse_wgrad_accumulation=True"
        )


def _check_directions(name: str, precision: LinearPrecision, api: Api) -> None:
    """Before 2.19 both directions of a tensor come from one quantizer (trap 13)."""
    if api.features.mixed_directions:
        return
    for tensor in TENSORS:
        row, column = directions(precision, tensor)
        if not one_quantizer(row, column):
            raise ValueError(
                f"{name}: its {tensor} is quantized differently for two GEMMs, or not at all, which modules of"
                f" Transformer Engine {api.version} cannot do; install transformer-engine>=2.19, or use this linear"
                f" outside of te.autocast (precision.backend=transformer_engine itself has no such limit)"
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
