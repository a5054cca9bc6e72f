"""Values of a config.json that are nonsense are refused by their key, whatever they are."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_fp4.models.foreign.config import transformers_config
from megatron_fp4.models.foreign.read_config import parse_config, read_config
from tests.interop.test_families import MODELS

NONSENSE = (None, 0, -1, 1.5, "x", "", True, [], {}, [[]], {"a": 1}, ["x", 1], [None], math.nan, math.inf, 10**30)
MORE = {
    "llama yarn": {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.1},
    "qwen2 window": {"max_window_layers": 0},
    "nemotron_h": {"hybrid_override_pattern": "M-*M-", "layer_types": None},
}
"""Keys that we do not write, and others do."""


def values_of(name: str) -> dict[str, Any]:
    values = transformers_config(MODELS[name], seq_length=64)
    more = MORE.get(name, {})
    if "rope_parameters" in values and "mscale" in more:
        return {**values, "rope_parameters": {**values["rope_parameters"], **more}}
    return {key: value for key, value in {**values, **more}.items() if key != "layer_types" or "qwen" not in name}


def places(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


@pytest.mark.parametrize("name", ["llama 3.1", "llama yarn", "mistral", "qwen2 window", "phi3", "nemotron_h"])
def test_nonsense_is_no_traceback(name: str) -> None:
    values = values_of(name)
    parse_config(values)
    for place in places({**values, "layer_types": None}):
        for nonsense in NONSENSE:
            changed = copy.deepcopy(values)
            inner = changed[place[0]] if len(place) > 1 else changed
            inner[place[-1]] = nonsense
            try:
                parse_config(changed)
            except ValueError:
                pass
            except Exception as error:
                pytest.fail(f"{'.'.join(place)} = {nonsense!r}: {error!r}")


@pytest.mark.parametrize(
    ("name", "changed", "refusal"),
    [
        ("mistral", {"sliding_window": 0}, "sliding_window = 0"),
        ("qwen2 window", {"layer_types": []}, r"layer_types = \[\]"),
        ("qwen2 window", {"layer_types": ["full_attention"]}, "layer_types = .*of 2 layers"),
        ("llama 3.1", {"original_max_position_embeddings": 32}, "= 32, but beside the factor 64"),
        ("llama yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0}}, "_factor = 0"),
        (
            "llama yarn",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e3}},
            "rope_param.*: factor is missing",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta = None"),
        ("mistral", {"rope_parameters": None, "rope_theta": None}, "rope_theta = None"),
        (
            "nemotron_h",
            {"hybrid_override_pattern": "M-*M*"},
            r"hybrid_override_pattern = 'M-\*M\*', but the layers are",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 0}}, r"rope_theta = 0\.0, a base"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "'linear'.*it computes default"),
        ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "it computes default"),
    ],
)
def test_what_says_two_things_or_none(name: str, changed: dict[str, Any], refusal: str) -> None:
    """A window of no token, layers without a kind, two lengths before the extension, queries times 0."""
    with pytest.raises(ValueError, match=refusal):
        parse_config({**transformers_config(MODELS[name], seq_length=64), **changed})


def test_a_number_of_layers_takes_no_memory() -> None:
    with pytest.raises(ValueError, match="num_layers"):
        parse_config({**values_of("qwen2 window"), "num_hidden_layers": 10**7})


def test_a_deep_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match="is no JSON object"):
        read_config(tmp_path)
