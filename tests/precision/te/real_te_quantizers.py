"""Part 1 of real_te_check.py: recipes and quantizers of real Transformer Engine classes against the precision plan.

Every file of configs/precision/recipe, and every plan that becomes an `NVFP4BlockScaling`; the attributes that each
quantizer must have are written down here once more, independently of `make_quantizer`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from megatron_fp4.cli.compose import CONFIG_DIR, compose_config, to_run_config
from megatron_fp4.comm.mesh import Group
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.precision import Operand, nvfp4_paper, te_recipe
from megatron_fp4.precision.backends import Copy
from megatron_fp4.precision.backends.transformer_engine import TransformerEngineBackend, _calls
from megatron_fp4.precision.config import PrecisionConfig, Rule
from megatron_fp4.precision.operand import Format, FourOverSix, Rounding, Signs
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.te.quantizers import TENSORS, directions, one_quantizer
from tests.helpers.parity import MODEL


def check_quantizers() -> list[str]:
    """Differences, one line each."""
    wrong = check_uniform()
    for path in sorted((CONFIG_DIR / "precision/recipe").glob("*.yaml")):
        wrong += check_config(path.stem)
    return wrong


def check_config(name: str) -> list[str]:
    """What is wrong with the recipe and the quantizers of one file of configs/precision/recipe."""
    special = ["model=nemotron_h_8b", "precision/rules=nemotron3"] if name == "nemotron3" else ["model=gpt_50m"]
    config = to_run_config(compose_config([f"precision/recipe={name}", "model.vocab_size=131072", *special]))
    plan = PrecisionPlan(config.precision, model_linears(config.model))
    try:
        recipe = te_recipe(plan, unsharded=True)
        backend = TransformerEngineBackend(config.precision)
    except ValueError as refusal:
        print(f"  {name}: refused: {refusal}")
        return []
    return compare_all(name, plan, recipe, backend)


def check_uniform() -> list[str]:
    """Plans of one recipe: all that become an `NVFP4BlockScaling`."""
    wrong = []
    for rht, stochastic, square in itertools.product((True, False), repeat=3):
        precision = nvfp4_paper(rht=rht, stochastic=stochastic, square_weights=square)
        config = PrecisionConfig(recipes={"r": precision}, rules=[Rule("*", use="r")])
        plan = PrecisionPlan(config, model_linears(ModelConfig(**MODEL)))
        recipe = te_recipe(plan, unsharded=True)
        assert type(recipe).__name__ == "NVFP4BlockScaling"
        label = f"one recipe, rht={rht}, stochastic={stochastic}, square_weights={square}"
        wrong += compare_all(label, plan, recipe, TransformerEngineBackend(config))
    return wrong


def compare_all(name: str, plan: PrecisionPlan, recipe: Any, backend: TransformerEngineBackend) -> list[str]:
    """Real quantizers of the modules and of the backend against the plan."""
    wrong = []
    rows = {row.precision: row for row in plan.table().rows}.values()
    for row in rows:
        quantizers = real_quantizers(recipe, row.name)
        for tensor in TENSORS:
            operands = directions(row.precision, tensor)
            reasons = compare(quantizers[tensor], *operands)
            for part, operand in backend_quantizers(backend, *operands):
                reasons += [f"backend: {text}" for text in differences(part, operand)]
            wrong += [f"{row.name} {tensor}: {text}" for text in reasons]
    print(f"  {name}: {type(recipe).__name__}, {len(rows)} precisions, {len(wrong)} differences")
    return [f"{name}: {line}" for line in wrong]


def real_quantizers(recipe: Any, linear: str) -> dict[str, Any]:
    """The quantizers that a `te.Linear` of this name gets, made by Transformer Engine."""
    from transformer_engine.pytorch.quantization import QuantizerRole, RecipeState

    quantizers = {}
    for mode, tensors in (("forward", ("input", "weight", "output")), ("backward", ("grad_output", "grad_input"))):
        roles = [QuantizerRole("linear", tensor, linear) for tensor in tensors]
        state = RecipeState.create(
            recipe, mode=mode, num_quantizers=len(roles), roles=roles, device=torch.device("cpu")
        )
        quantizers.update(zip(tensors, state.make_quantizers(), strict=True))
    return quantizers


def compare(quantizer: Any, row: Operand, column: Operand) -> list[str]:
    """Differences between a real quantizer and the operands that it stands for."""
    if type(quantizer).__name__ == "HybridQuantizer":
        parts = [(quantizer.rowwise_quantizer, row), (quantizer.columnwise_quantizer, column)]
        assert not one_quantizer(row, column)
    else:
        parts = [(quantizer, column if column.quantized else row)]
    return [text for part, operand in parts for text in differences(part, operand)]


def differences(quantizer: Any, operand: Operand) -> list[str]:
    asked = attributes(operand)
    actual = {key: getattr(quantizer, key, "absent") for key in asked} | {"class": type(quantizer).__name__}
    return [f"{key} is {actual[key]}, not {asked[key]}" for key in asked if actual[key] != asked[key]]


def backend_quantizers(backend: TransformerEngineBackend, row: Operand, column: Operand) -> list[tuple[Any, Operand]]:
    """The real quantizers that the backend makes for one tensor, each with the operand that it stands for."""
    copies = [Copy("", row, along=1), Copy("", column, along=0)]
    return [
        (backend._quantizer(*pair, Group.single()), (pair[1] or pair[0]).operand)  # type: ignore[union-attr]
        for pair in _calls([copy for copy in copies if copy.operand.quantized])
    ]


def attributes(operand: Operand) -> dict[str, Any]:
    """What the attributes of a real quantizer must be, written down independently of `make_quantizer`."""
    if operand.format is Format.bf16:
        return {"class": "IdentityQuantizer", "dtype": None}
    if operand.format is Format.mxfp8:
        return {"class": "MXFP8Quantizer", "dtype": e4m3(), "with_2d_quantization": False}
    if operand.format is Format.fp8_block:
        dims = {(1, 128): 1, (128, 128): 2}[operand.tile or ()]
        return {
            "class": "Float8BlockQuantizer",
            "dtype": e4m3(),
            "block_scaling_dim": dims,
            "force_pow_2_scales": True,
            "amax_epsilon": 0.0,
            "block_len": 128,
        }
    return {
        "class": "NVFP4Quantizer",
        "with_rht": operand.rht_size == 16,
        "with_post_rht_amax": operand.rht_size == 16,
        "with_2d_quantization": operand.tile == (16, 16),
        "stochastic_rounding": operand.rounding is Rounding.sr,
        "rht_matrix_random_sign_mask_t": 0 if operand.rht_signs is Signs.none else 0b1101011111101000,
        "row_scaled_nvfp4": False,
        "nvfp4_use_4over6": operand.four_over_six is not FourOverSix.off,
        "nvfp4_e4m3_max": 448 if operand.four_over_six is FourOverSix.off else operand.four_over_six_bound,
    }


def e4m3() -> Any:
    from transformer_engine.pytorch.constants import DType

    return DType.kFloat8E4M3
