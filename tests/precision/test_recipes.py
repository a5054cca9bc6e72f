"""The recipes in code and those in configs/ are the same values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_fp4.cli.compose import CONFIG_DIR, compose_config, to_run_config
from megatron_fp4.precision.operand import AmaxScope
from megatron_fp4.precision.recipes import RECIPES, nvfp4_forward, nvfp4_ms_eden, nvfp4_paper
from megatron_fp4.precision.spec import LinearPrecision

OPTIONS = sorted(path.stem for path in (CONFIG_DIR / "precision/recipe").glob("*.yaml"))
CHANGES = {
    "nvfp4_forward": nvfp4_forward(),
    "nvfp4_no_rht": nvfp4_paper(rht=False),
    "nvfp4_no_sr": nvfp4_paper(stochastic=False),
    "nvfp4_no_2d": nvfp4_paper(square_weights=False),
    "nvfp4_ms_eden": nvfp4_ms_eden(),
    "nvfp4_quartet2": nvfp4_ms_eden(square_weights=False),
    "nvfp4_shard": nvfp4_paper().with_operands(lambda operand: replace(operand, amax_scope=AmaxScope.shard)),
}


def composed(option: str) -> dict[str, LinearPrecision]:
    return to_run_config(compose_config([f"precision/recipe={option}"])).precision.recipes


def test_both_have_the_same_recipes() -> None:
    plain = [option for option in OPTIONS if not option.startswith("nvfp4_")]
    assert {name: recipe for option in plain for name, recipe in composed(option).items()} == RECIPES


@pytest.mark.parametrize("option", CHANGES)
def test_a_change_in_yaml_is_the_change_in_code(option: str) -> None:
    assert composed(option) == {"nvfp4": CHANGES[option]}


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.startswith("nvfp4_")])
def test_every_change_changes_something(option: str) -> None:
    assert composed(option)["nvfp4"] != nvfp4_paper()
