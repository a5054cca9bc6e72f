"""The tensors of each kind of mixer in transformers, and the logical tensors that are joined in each.

Not here: which blocks a model has and what a family calls them (families.py).
"""

from __future__ import annotations

from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.experts import expert_tensors


def mixer_tensors(kind: str, config: ModelConfig, *, fused: bool) -> dict[str, tuple[str, ...]]:
    """The tensors of a mixer in transformers, and what is joined in each; names within the mixer.

    fused: one tensor for q, k and v, and one for gate and up.
    """
    if kind == "attention":
        return _attention_tensors(config, fused=fused)
    if kind == "moe":
        return expert_tensors(config)
    if kind == "mlp":
        if config.activation is not Activation.swiglu:
            return {"up_proj.weight": ("up.weight",), "down_proj.weight": ("down.weight",)}
        gate, up = "gate_up.gate.weight", "gate_up.up.weight"
        down: dict[str, tuple[str, ...]] = {"down_proj.weight": ("down.weight",)}
        if fused:
            return {"gate_up_proj.weight": (gate, up), **down}
        return {"gate_proj.weight": (gate,), "up_proj.weight": (up,), **down}
    return {
        "in_proj.weight": tuple(f"in_proj.{part}.weight" for part in ("z", "x", "B", "C", "dt")),
        "conv1d.weight": tuple(f"conv.{part}.weight" for part in "xBC"),
        "conv1d.bias": tuple(f"conv.{part}.bias" for part in "xBC"),
        "A_log": ("A_log",),
        "dt_bias": ("dt_bias",),
        "D": ("D",),
        "norm.weight": ("norm.weight",),
        "out_proj.weight": ("out_proj.weight",),
    }


def _attention_tensors(config: ModelConfig, *, fused: bool) -> dict[str, tuple[str, ...]]:
    tensors: dict[str, tuple[str, ...]] = {"o_proj.weight": ("out.weight",)}
    for leaf in ("weight", "bias") if config.qkv_bias else ("weight",):
        parts = {f"{part}_proj.{leaf}": (f"qkv.{part}.{leaf}",) for part in "qkv"}
        tensors |= {f"qkv_proj.{leaf}": tuple(part for one in parts.values() for part in one)} if fused else parts
    if config.qk_norm is not QkNorm.none:
        tensors |= {f"{part}_norm.weight": (f"{part}_norm.weight",) for part in "qk"}
    return tensors
