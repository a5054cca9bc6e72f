"""Every combination of settings without a meaning is refused, and says why; all others print differently."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import pytest

from megatron_fp4.precision import (
    AmaxScope,
    Format,
    FourOverSix,
    Fprop,
    LinearPrecision,
    Operand,
    Rounding,
    ScaleOrder,
    Signs,
    Wgrad,
    WgradOutput,
    nvfp4_paper,
    uniform,
)
from megatron_fp4.precision.operand import RHT_SIZES, AmaxRounding

EDEN = {"rounding": Rounding.ms_eden, "rht_size": 128, "rht_signs": Signs.per_index}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rounding": Rounding.sr}, "nothing is quantized"),
    ({"rht_size": 8}, "rht_size=8; use 0"),
    ({"rht_signs": Signs.none}, "nothing is quantized"),
    ({"format": Format.mxfp4, "rounding": Rounding.ms_eden}, "scales of nvfp4"),
    ({"format": Format.nvfp4, "rounding": Rounding.ms_eden}, "rht_size=128 with rht_signs=per_index"),
    ({"format": Format.nvfp4, "rounding": Rounding.ms_eden, "rht_size": 128}, "rht_signs=per_index"),
    ({"format": Format.nvfp4, "rounding": Rounding.ms_eden, "noise_bits": 20}, "draws no noise"),
    ({"format": Format.nvfp4, "tile": (16, 16), **EDEN}, "use 1x16"),
    ({"format": Format.nvfp4, **EDEN, "four_over_six": FourOverSix.mse, "four_over_six_bound": 448}, "use 256"),
    ({"tile": (1, 16)}, "nothing is quantized"),
    ({"format": Format.nvfp4, "tile": (1, 32)}, "use 1x16 or 16x16"),
    ({"format": Format.mxfp4, "tile": (16, 16)}, "use 1x32"),
    ({"format": Format.nvfp4, "rht_size": 8}, "rht_size=8"),
    ({"format": Format.nvfp4, "rht_signs": Signs.none}, "without a transform"),
    ({"format": Format.nvfp4, "noise_bits": 20}, "draws no noise"),
    ({"format": Format.nvfp4, "noise_bits": 16, "rounding": Rounding.sr}, "use 8"),
    ({"format": Format.nvfp4, "four_over_six_bound": 448}, "four_over_six is off"),
    ({"format": Format.nvfp4, "four_over_six": FourOverSix.mae, "four_over_six_bound": 300}, "use 256 or 448"),
    ({"format": Format.nvfp4, "four_over_six": FourOverSix.mae, "scale_order": ScaleOrder.paper}, "one order"),
    ({"format": Format.nvfp4, "four_over_six": FourOverSix.mse, "rounding": Rounding.sr_headroom}, "headroom"),
    ({"format": Format.nvfp4, "tile": (16, 16), "amax_scope": AmaxScope.row}, "shares one among 16 rows"),
    ({"format": Format.nvfp4, "tile": (16, 16), "amax_scope": AmaxScope.group128}, "shares one among 16 rows"),
    ({"format": Format.mxfp4, "amax_scope": AmaxScope.group128}, "two-level scales"),
    ({"center": True}, "nothing is quantized, so center"),
    ({"format": Format.mxfp8, "rounding": Rounding.sr}, "E2M1 codes only"),
    ({"format": Format.mxfp4, "rounding": Rounding.sr_headroom}, "nothing is clipped"),
    ({"format": Format.mxfp4, "amax_scope": AmaxScope.row}, "two-level scales"),
    ({"format": Format.fp8_block, "four_over_six": FourOverSix.mae}, "two-level scales"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_setting_without_effect_is_refused(settings: dict[str, Any], reason: str) -> None:
    """If it is accepted, a user believes that an experiment differs when it does not."""
    with pytest.raises(ValueError, match=reason):
        Operand(**settings)


def test_one_sided_transform_is_refused() -> None:
    """A transform on one operand only would multiply the product by a Hadamard matrix."""
    with pytest.raises(ValueError, match="cancel in the product"):
        Wgrad(Operand(Format.nvfp4, rht_size=16), Operand(Format.nvfp4))


def test_the_mean_of_weights_and_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="center of w, but the mean over tokens is that of activations"):
        Fprop(Operand(Format.nvfp4), Operand(Format.nvfp4, center=True))


def test_yaml_lists_and_hashing() -> None:
    """Precision values come from YAML (lists) and are keys of caches (hashable, equal by value)."""
    assert Operand(Format.nvfp4, tile=[16, 16]) == Operand(Format.nvfp4, tile=(16, 16))  # type: ignore[arg-type]
    assert hash(nvfp4_paper()) == hash(nvfp4_paper())
    assert nvfp4_paper() != nvfp4_paper(rht=False)
    assert Operand(Format.fp8_block).tile == (1, 128)


def test_the_paper_recipe() -> None:
    """Section 4 of the paper: which tensor gets which treatment."""
    recipe = nvfp4_paper()
    assert recipe.fprop.w == recipe.dgrad.w == Operand(Format.nvfp4, tile=(16, 16))
    assert recipe.fprop.x == Operand(Format.nvfp4)
    assert recipe.dgrad.dy == Operand(Format.nvfp4, rounding=Rounding.sr)
    assert recipe.wgrad.dy == Operand(Format.nvfp4, rounding=Rounding.sr, rht_size=16)
    assert recipe.wgrad.x == Operand(Format.nvfp4, rht_size=16)
    assert not LinearPrecision().quantized
    assert recipe.quantized


# -- text -------------------------------------------------------------------------------------------------------------

ALTERNATIVES: dict[str, list[Any]] = {
    "format": list(Format),
    "tile": [None, (1, 16), (16, 16), (1, 32), (1, 128), (128, 128)],
    "rounding": list(Rounding),
    "noise_bits": [8, 20],
    "rht_size": [0, 16, 128],
    "rht_signs": list(Signs),
    "scale_order": list(ScaleOrder),
    "amax_scope": list(AmaxScope),
    "amax_rounding": list(AmaxRounding),
    "four_over_six": list(FourOverSix),
    "four_over_six_bound": [256, 448],
    "center": [False, True],
}


def every_operand() -> set[Operand]:
    """All that are not refused."""
    formats, tiles, *others = ALTERNATIVES.values()
    operands = set()
    for kind in itertools.product(formats, tiles):
        with suppress(ValueError):
            operands.add(Operand(*kind))
            for values in itertools.product(*others):
                with suppress(ValueError):
                    operands.add(Operand(*kind, *values))
    return operands


def test_the_text_of_the_paper_recipe() -> None:
    assert str(nvfp4_paper()) == (
        "fprop x nvfp4, w nvfp4 16x16 | dgrad dy nvfp4 sr, w nvfp4 16x16 | wgrad dy nvfp4 sr rht16, x nvfp4 rht16"
    )
    assert str(LinearPrecision()) == "bf16"
    assert str(Operand(Format.nvfp4, rht_size=4, rht_signs=Signs.none)) == "nvfp4 rht4 rht_signs=none"
    assert str(Operand(Format.fp8_block, tile=(128, 128))) == "fp8_block 128x128"
    assert str(replace(Fprop(Operand(Format.mxfp8)), pad=True)) == "fprop x mxfp8, w bf16 padded"


def test_two_operands_never_print_alike() -> None:
    """Two recipes that compute differently would look the same in a table, a ledger and print(model)."""
    assert list(ALTERNATIVES) == [field.name for field in fields(Operand)], "walk the new field too"
    operands = every_operand()
    assert len({str(operand) for operand in operands}) == len(operands) > 1000


def test_two_recipes_never_print_alike() -> None:
    """Every field of the precision of a linear, changed alone (transforms: in both operands of a GEMM)."""
    paper, other = nvfp4_paper(), Operand(Format.nvfp4, scale_order=ScaleOrder.paper)
    recipes = {paper, LinearPrecision(), uniform(other)}
    for recipe in (paper, LinearPrecision()):
        recipes |= {replace(recipe, wgrad_output=output) for output in WgradOutput}
        for gemm in recipe.gemms:
            changed = [replace(gemm, pad=True)] if gemm.quantized else []
            if gemm.operands[0].rht_size == 0:
                changed += [replace(gemm, **{tensor: other}) for tensor in gemm.tensors]
            changed += [type(gemm)(*[replace(other, rht_size=size)] * 2) for size in RHT_SIZES]
            recipes |= {replace(recipe, **{gemm.name: one}) for one in changed}
    assert [field.name for field in fields(LinearPrecision)] == ["fprop", "dgrad", "wgrad", "wgrad_output"]
    assert {field.name for gemm in paper.gemms for field in fields(gemm)} == {"pad", "x", "w", "dy"}
    assert len({str(recipe) for recipe in recipes}) == len(recipes) > 40
