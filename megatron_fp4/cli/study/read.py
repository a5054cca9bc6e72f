"""A study's YAML as a value; a mistake is one sentence that names the file.

    name: recipe                       folders and titles
    question: Which parts of the recipe does a small model need?
    base: [experiment=quickstart, train.steps=200]
    seeds: [1, 2, 3]
    measure: {loss: training, window_steps: 50}
    arms:                              the first is what the others are compared with
      bf16: [precision=bf16]
      nvfp4: []
    claims:
      - {arm: nvfp4, against: bf16, percent: [0, 1.5], because: "arXiv 2509.25149, figure 2"}

`percent: [0, null]` is open above. `measure: gradient_error` beside it, or another `Quantity`, is of --gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_fp4.cli.overrides.mistakes import ConfigError, yaml_mistake
from megatron_fp4.cli.overrides.places import CONFIG_DIR
from megatron_fp4.studies.design import Claim, Measure, Quantity, Study

KEYS = {"name", "question", "base", "seeds", "measure", "arms", "claims"}
SHIPPED = CONFIG_DIR / "study"


def find_study(name: str) -> Path:
    """The file of a study: a path, or the name of one of `configs/study`. Raises ConfigError."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    raise ConfigError(f"there is no study {name}: neither a file, nor one of {', '.join(shipped) or 'configs/study'}")


def read_study(path: Path) -> Study:
    """Raises ConfigError."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {yaml_mistake(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        return _study(_mapping(tree, "a study", KEYS), path.stem)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from None


def _study(tree: Mapping[str, Any], stem: str) -> Study:
    arms = _mapping(tree.get("arms"), "arms")
    seeds = tree.get("seeds")
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds = {seeds!r}; give a list of whole numbers, as [1, 2, 3]")
    measure = _mapping(tree.get("measure") or {}, "measure", {"loss", "window_steps"})
    return Study(
        name=str(tree.get("name", stem)),
        question=str(tree.get("question", "")),
        base=_overrides(tree.get("base"), "base"),
        arms={str(arm): _overrides(settings, f"arms.{arm}") for arm, settings in arms.items()},
        seeds=seeds,
        measure=Measure(**measure),
        claims=[_claim(one) for one in tree.get("claims") or []],
    )


def _claim(tree: Any) -> Claim:
    given = _mapping(tree, "a claim", {"arm", "against", "percent", "because", "measure"})
    if missing := {"arm", "against", "percent"} - set(given):
        raise ValueError(f"a claim has no {', '.join(sorted(missing))}; give arm, against and percent: [low, high]")
    ends = given["percent"]
    good = isinstance(ends, list) and len(ends) == 2 and all(end is None or type(end) in (int, float) for end in ends)
    if not good:
        raise ValueError(f"percent = {ends!r} of a claim; give [low, high], with null for a side that is open")
    low = -math.inf if ends[0] is None else float(ends[0])
    high = math.inf if ends[1] is None else float(ends[1])
    quantities = {one.value: one for one in Quantity}
    measure = str(given.get("measure", Quantity.loss.value))
    if measure not in quantities:
        raise ValueError(f"measure = {measure} of a claim; use one of {', '.join(quantities)}")
    because = str(given.get("because", ""))
    return Claim(str(given["arm"]), str(given["against"]), low, high, because, quantities[measure])


def _mapping(tree: Any, what: str, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"{what} is {tree!r}; give keys with values")
    if keys is not None and (unknown := set(tree) - keys):
        raise ValueError(f"{what} has no {', '.join(sorted(map(str, unknown)))}; it has {', '.join(sorted(keys))}")
    return {str(key): value for key, value in tree.items()}


def _overrides(tree: Any, what: str) -> list[str]:
    if not isinstance(tree, list) or not all(isinstance(one, str) for one in tree):
        raise ValueError(f"{what} = {tree!r}; give a list of settings as one types them, as [optim.lr=1e-3]")
    return list(tree)
