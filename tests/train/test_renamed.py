"""Old names of settings: translated part by part, and found wherever they stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fp4.settings import sections
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.renamed import (
    RENAMED,
    RENAMED_OPTIONS,
    current_name,
    renamed_keys,
    renamed_option,
    renaming_message,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("precision.recipes.mine.fprop.b", "precision.recipes.mine.fprop.w"),
        ("precision.recipes.mine.dgrad.a.rounding", "precision.recipes.mine.dgrad.dy.rounding"),
        ("precision.recipes.mine.fprop", "precision.recipes.mine.fprop"),
        ("precision.recipes.a.fprop.x", "precision.recipes.a.fprop.x"),
        ("model.num_layers", "model.num_layers"),
    ],
)
def test_the_current_name(key: str, expected: str) -> None:
    assert current_name(key) == expected


def test_renamed_keys_in_nested_settings() -> None:
    settings = {"precision": {"recipes": {"r": {"fprop": {"a": {"format": "nvfp4"}, "w": {}}}}}, "seed": 1}
    keys = {"precision.recipes.r.fprop.a": "precision.recipes.r.fprop.x"}
    assert renamed_keys(settings) == renamed_keys(settings["precision"], "precision") == keys
    assert renaming_message(keys) == "precision.recipes.r.fprop.a is now called precision.recipes.r.fprop.x"


def test_new_names_exist_and_old_ones_do_not() -> None:
    """An entry with a mistake in it would send people to a setting that is refused too."""
    every_section = list(sections(RunConfig))
    known = {section.key for section in every_section}
    known |= {f"{section.key}.{setting.name}" for section in every_section for setting in section.settings}
    known = {key.replace("NAME", "*") for key in known}
    for old, new in RENAMED.items():
        assert new in known, f"{new} is no setting"
        assert old not in known, f"{old} is a setting of today"


def test_new_options_exist_and_old_ones_do_not() -> None:
    for old, new in RENAMED_OPTIONS.items():
        for option, expected in ((old, False), (new, True)):
            group, _, name = option.partition("=")
            assert (CONFIGS / group / f"{name}.yaml").exists() is expected, option
        assert renamed_option(*old.split("=")) == f"{old} is now called {new}"
    assert renamed_option("precision", "bf16") == ""
    for group in ("precision/recipe", "precision/rules"):
        assert renamed_option(group, "nvfp4_paper") == f"{group}=nvfp4_paper is now called precision/rules=paper_12b"
    assert renamed_option("precision/recipe", "nvfp4_rht4") == "", "where it stands today"
