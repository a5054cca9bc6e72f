"""The rotary embedding of a `config.json`: its base, its scaling, and the part of a head that is rotated.

Both dialects are read: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5. What transformers
5.23 refuses or fails on is refused: it is no model that somebody has seen at work.

Not here: the rest of the file (read_config.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_fp4.layers.rope import RopeScaling, RopeScalingConfig
from megatron_fp4.models.foreign.families import Family
from megatron_fp4.models.foreign.values import ForeignValues


def rope_of(reader: ForeignValues, family: Family, length: int) -> tuple[RopeScalingConfig, float, float]:
    """Scaling, base, and the part of a head that is rotated. Raises ValueError naming the key and the value."""
    old, new = reader.take("rope_scaling"), reader.take("rope_parameters")
    reader.expect_not("rope_theta", None)  # a missing one has a default
    theta, fraction = reader.take("rope_theta"), reader.take("partial_rotary_factor")
    outer = reader.take("original_max_position_embeddings")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict | None):
            raise reader.refused(name, value, "which is no object of numbers")
    if old and new and _without(old, "type", "rope_theta") != _without(new, "type", "rope_theta"):
        raise reader.refused("rope_scaling", old, f"but rope_parameters = {new!r}")
    values = new or old or {}
    length_inside = values.get("original_max_position_embeddings")
    if family is not Family.phi3 and None not in (outer, length_inside) and outer != length_inside:
        raise reader.refused("original_max_position_embeddings", outer, f"but beside the factor {length_inside!r}")
    inner = ForeignValues(values, f"{reader.source}, {'rope_parameters' if new else 'rope_scaling'}")
    old_kind = inner.take("type", "default")
    kind = inner.take("rope_type", old_kind)
    inner.expect_not("rope_theta", None)
    base = inner.number("rope_theta", 10000.0 if theta is None else theta)
    if theta not in (None, base):
        raise reader.refused("rope_theta", theta, f"but rope_parameters has {base!r}")
    if base <= 1:
        raise inner.refused("rope_theta", base, "a base of frequencies, which is above 1")
    fraction = inner.number("partial_rotary_factor", 1.0 if fraction is None else fraction)
    if fraction != 1 and family is not Family.phi3:
        raise reader.refused("partial_rotary_factor", fraction, f"which transformers' class of {family.value} has not")
    known = {"default": RopeScaling.none}
    if family is not Family.phi3:  # its class has no linear scaling, and takes yarn for longrope
        known |= {"linear": RopeScaling.linear, "llama3": RopeScaling.llama3, "yarn": RopeScaling.yarn}
    if not isinstance(kind, str) or kind not in known:
        raise inner.refused("rope_type", kind, f"which this model does not compute; it computes {', '.join(known)}")
    try:
        scaling = _scaling(inner, known[kind], outer or length, length)
    except ValueError as error:
        beginning = "" if str(error).startswith(inner.source) else f"{inner.source}: "
        raise ValueError(f"{beginning}{error}") from None
    return scaling, base, fraction


def _scaling(inner: ForeignValues, kind: RopeScaling, original: int, length: int) -> RopeScalingConfig:
    settings: dict[str, Any] = {"kind": kind}
    if kind in (RopeScaling.llama3, RopeScaling.yarn):
        settings["original_length"] = original = inner.count("original_max_position_embeddings", original)
    if kind is RopeScaling.yarn:
        inner.require("factor")  # null is the ratio of the two lengths
    if kind is not RopeScaling.none:
        settings["factor"] = inner.number("factor", length / original if kind is RopeScaling.yarn else None)
    if kind is RopeScaling.llama3:
        settings["low_frequency"] = inner.number("low_freq_factor")
        settings["high_frequency"] = inner.number("high_freq_factor")
    if kind is RopeScaling.yarn:
        settings["beta_fast"] = inner.number("beta_fast", 32.0) or 32.0
        settings["beta_slow"] = inner.number("beta_slow", 1.0) or 1.0
        settings["truncate"] = bool(inner.take("truncate", True))
        settings["attention_factor"] = _attention_factor(inner, settings["factor"])
    inner.check_rest()
    return RopeScalingConfig(**settings)


def _attention_factor(inner: ForeignValues, factor: float) -> float:
    """What cosine and sine are multiplied by, 0 where it follows from the factor alone."""
    inner.expect_not("attention_factor", 0)
    given, scale, whole = (inner.number(key, 0.0) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given or not (scale and whole):
        return given
    return (0.1 * scale * math.log(factor) + 1.0) / (0.1 * whole * math.log(factor) + 1.0)


def _without(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    kind = values.get("rope_type", values.get("type"))
    return {**{key: value for key, value in values.items() if key not in keys}, "rope_type": kind}
