"""Every combination of settings without a meaning is refused, and says why."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fp4.precision import (
    AmaxScope,
    Format,
    FourOverSix,
    LinearPrecision,
    Operand,
    Rounding,
    ScaleOrder,
    Signs,
    Wgrad,
    nvfp4_paper,
)

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rounding": Rounding.sr}, "nothing is quantized"),
    ({"rht_size": 16}, "nothing is quantized"),
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
