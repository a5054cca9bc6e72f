"""Settings that once had another name: whoever still uses the old one is told the new one.

A commit that renames a setting adds a line to `RENAMED`. Overrides and the config.yaml of an old run are then refused
with the new name (cli/compose.py), and the settings in an old checkpoint are compared under it (resume/differences.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "precision.recipes.*.fprop.a": "precision.recipes.*.fprop.x",
    "precision.recipes.*.fprop.b": "precision.recipes.*.fprop.w",
    "precision.recipes.*.dgrad.a": "precision.recipes.*.dgrad.dy",
    "precision.recipes.*.dgrad.b": "precision.recipes.*.dgrad.w",
    "precision.recipes.*.wgrad.a": "precision.recipes.*.wgrad.dy",
    "precision.recipes.*.wgrad.b": "precision.recipes.*.wgrad.x",
}
"""Old dotted key -> new one. `*` is any one part of the key; what lies under a key goes with it."""

RENAMED_OPTIONS = {
    **{
        f"precision={recipe}": f"precision/recipe={recipe}"
        for recipe in (
            "nvfp4_4over6", "nvfp4_no_2d", "nvfp4_no_rht", "nvfp4_no_sr", "nvfp4_rht128", "nvfp4_rht4", "nvfp4_shard",
            "nvfp4_signs_none", "nvfp4_signs_per_step", "nvfp4_sr_activations", "nvfp4_sr_backward", "nvfp4_sr_weights",
        )
    },
    "precision=nvfp4_paper": "precision/rules=paper_12b",
    "precision=nvfp4_paper_1_2b": "precision/rules=paper_1_2b",
    "precision=nvfp4_paper_8b": "precision/rules=paper_8b",
}  # fmt: skip
"""Old option of a group of configs/ -> new one."""


def current_name(key: str) -> str:
    """The name that `key` has today: itself, unless it was renamed."""
    parts = key.split(".")
    for old, new in RENAMED.items():
        pattern = old.split(".")
        if len(parts) >= len(pattern) and all(one in ("*", part) for one, part in zip(pattern, parts, strict=False)):
            wildcards = iter([part for one, part in zip(pattern, parts, strict=False) if one == "*"])
            renamed = [next(wildcards) if one == "*" else one for one in new.split(".")]
            return ".".join(renamed + parts[len(pattern) :])
    return key


def renamed_keys(settings: Any, prefix: str = "") -> dict[str, str]:
    """Old key -> new key, for the keys in nested settings that were renamed. prefix: the key of `settings`."""
    if prefix and current_name(prefix) != prefix:
        return {prefix: current_name(prefix)}
    keys: dict[str, str] = {}
    for name, value in settings.items() if isinstance(settings, Mapping) else ():
        keys |= renamed_keys(value, f"{prefix}.{name}".lstrip("."))
    return keys


def renaming_message(keys: Mapping[str, str]) -> str:
    return ", ".join(f"{old} is now called {new}" for old, new in keys.items())


def renamed_option(group: str, option: str) -> str:
    """The message for an option that has another name today, or stands in another group; "" for one that has not."""
    old = f"{group.partition('/')[0]}={option}"
    if RENAMED_OPTIONS.get(old, f"{group}={option}") == f"{group}={option}":
        return ""
    return renaming_message({f"{group}={option}": RENAMED_OPTIONS[old]})
