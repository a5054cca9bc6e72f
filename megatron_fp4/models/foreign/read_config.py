"""`config.json` of `transformers` as a `ModelConfig`, or a refusal that names what this model does not compute.

A missing key means what the class of that family takes for it in transformers 5.23, which is not imported.

Not here: the rotary embedding (read_rope.py), writing it (config.py), the tensors (weights.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.moe.config import MoeConfig
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.config import CLASS_NAMES
from megatron_fp4.models.foreign.experts import read_experts, read_mtp
from megatron_fp4.models.foreign.families import Family
from megatron_fp4.models.foreign.read_rope import rope_of
from megatron_fp4.models.foreign.values import ForeignValues

CONFIG = "config.json"
LETTERS = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}
KV_HEADS = {Family.mistral: 8, Family.qwen2: 32, Family.qwen3: 32, Family.nemotron_h: 8}
"""What a missing num_key_value_heads means; in the other families as many as num_attention_heads."""
HEAD_DIM = {Family.qwen3: 128, Family.nemotron_h: 128}
NORM_EPS = {Family.olmo2: 1e-5, Family.phi3: 1e-5, Family.arcee: 1e-5}
HYBRID_WITHOUT_EFFECT = (
    *("expand", "mamba_expand", "num_logits_to_keep", "use_mamba_kernels", "rescale_prenorm_residual"),
    *("residual_in_fp32", "mamba_ssm_cache_dtype", "rope_theta", "partial_rotary_factor", "num_hidden_layers"),
    *("time_step_min", "time_step_max", "time_step_floor", "mamba_dt_min", "mamba_dt_max", "mamba_dt_init_floor"),
    *("n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size"),
    *("moe_latent_size", "moe_shared_expert_overlap", "num_experts_per_tok", "routed_scaling_factor", "n_group"),
    *("topk_group", "norm_topk_prob", "output_router_logits", "mtp_layers_block_type", "mtp_hybrid_override_pattern"),
)
"""Keys of a Nemotron-H; those of experts and of layers for further tokens are read where a model has them. The limits
of the step sizes are those of their initial values, although transformers 5.23 also clamps to time_step_min; NVIDIA's
own code does not."""


@dataclass(frozen=True)
class ForeignModel:
    """A model of another library. max_length: tokens of a sample that it says it takes."""

    family: Family
    config: ModelConfig
    max_length: int


def read_config(folder: Path) -> ForeignModel:
    """The model in a folder of transformers. Raises FileNotFoundError, ValueError."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no JSON object")
    return parse_config(values, str(path))


def parse_config(values: Mapping[str, Any], source: str = CONFIG) -> ForeignModel:
    """Raises ValueError naming the key and the value that this model does not compute."""
    reader = ForeignValues(values, source)
    kind = reader.take("model_type")
    if kind not in [family.value for family in Family]:
        known = ", ".join(family.value for family in Family)
        raise reader.refused("model_type", kind, f"which this model does not compute; it computes {known}")
    family = Family(kind)
    reader.expect("architectures", [CLASS_NAMES[family]], None)
    reader.expect("quantization_config", None)
    if family not in (Family.nemotron_h, Family.phi3):  # whose own code was taken over by transformers
        reader.expect("auto_map", None)
    for key in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"):
        reader.expect(key, 0, None)
    for key in ("attention_bias", "mlp_bias"):
        reader.expect(key, False, None)
    sizes = _sizes(reader, family)
    length = reader.count("max_position_embeddings", 2048)
    special = _hybrid(reader) if family is Family.nemotron_h else _transformer(reader, family, length)
    reader.check_rest("auto_map", *(HYBRID_WITHOUT_EFFECT if family is Family.nemotron_h else ()))
    try:
        return ForeignModel(family, ModelConfig(**sizes, **special), length)
    except ValueError as error:
        raise ValueError(f"{source} describes a model that this one cannot be: {error}") from None


def _sizes(reader: ForeignValues, family: Family) -> dict[str, Any]:
    """What all families have."""
    hidden, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    old = reader.take("attention_head_dim")
    head_dim = reader.count("head_dim", old or HEAD_DIM.get(family, hidden // heads))
    if old not in (None, head_dim):
        raise reader.refused("attention_head_dim", old, f"but head_dim = {head_dim}")
    tied = reader.take("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise reader.refused("tie_word_embeddings", tied, "neither true nor false")
    return {
        "hidden": hidden,
        "num_heads": heads,
        "num_kv_heads": reader.count("num_key_value_heads", KV_HEADS.get(family, heads)),
        "head_dim": head_dim,
        "ffn_hidden": reader.count("intermediate_size"),
        "vocab_size": reader.count("vocab_size"),
        "tied_embeddings": tied,
        "init_std": reader.number("initializer_range", 0.02),
    }


def _transformer(reader: ForeignValues, family: Family, length: int) -> dict[str, Any]:
    """Settings of a model of T blocks."""
    squared = family is Family.arcee
    reader.expect("hidden_act", "relu2" if squared else "silu", default="relu2" if squared else "silu")
    layers = reader.count("num_hidden_layers")
    scaling, base, fraction = rope_of(reader, family, length)
    return {
        "num_layers": layers,
        "activation": Activation.squared_relu if squared else Activation.swiglu,
        "norm_eps": reader.number("rms_norm_eps", NORM_EPS.get(family, 1e-6)),
        "rope_base": base,
        "rope_scaling": scaling,
        "rope_fraction": fraction,
        "sliding_window": _window(reader, family, layers),
        "qkv_bias": family is Family.qwen2,
        "qk_norm": {Family.qwen3: QkNorm.head, Family.olmo2: QkNorm.full}.get(family, QkNorm.none),
        "post_norm": family is Family.olmo2,
    }


def _window(reader: ForeignValues, family: Family, layers: int) -> int:
    """The window of all blocks, 0 for none. Raises ValueError for one of some of the blocks."""
    types = reader.strings("layer_types")
    window, first = None, 0.0
    if family in (Family.qwen2, Family.qwen3):
        window, first = reader.take("sliding_window", 4096), reader.number("max_window_layers", 28)
        window = window if reader.take("use_sliding_window", False) else None
    elif family in (Family.mistral, Family.phi3):
        window = reader.take("sliding_window", 4096 if family is Family.mistral else None)
    else:
        reader.expect("sliding_window", None)
    slide = 0 if window is None else layers - int(min(max(first, 0), layers))
    if types is not None:
        slide = types.count("sliding_attention")
        if len(types) != layers or slide + types.count("full_attention") != layers:
            raise reader.refused("layer_types", types, f"no 'full_attention' or 'sliding_attention' of {layers} layers")
    if not slide:
        return 0
    if slide != layers or type(window) is not int or window < 1:
        mixed = f"{slide} of {layers} layers"
        raise reader.refused("sliding_window", window, f"in {mixed}; this model has one in all of them, or in none")
    return window


def _hybrid(reader: ForeignValues) -> dict[str, Any]:
    """Settings of a Nemotron-H."""
    reader.expect("mlp_hidden_act", "relu2", default="relu2")
    reader.expect("mamba_hidden_act", "silu", default="silu")
    reader.expect("use_conv_bias", True, default=True)
    for key in ("use_bias", "mamba_proj_bias"):
        reader.expect(key, False, default=False)
    reader.expect("sliding_window", None)
    reader.expect("time_step_limit", [0.0, math.inf], [0.0, {"__float__": "Infinity"}], None)
    pattern, types = reader.take("hybrid_override_pattern"), reader.strings("layers_block_type")
    types = reader.strings("layer_types") or types
    if not isinstance(pattern, str | None):
        raise reader.refused("hybrid_override_pattern", pattern, "no word")
    if pattern is None:
        if types is None or not set(types) <= LETTERS.keys():
            raise reader.refused("layers_block_type", types, f"this model has {', '.join(LETTERS)}")
        pattern = "".join(LETTERS[one] for one in types)
    if types is not None and "".join(LETTERS.get(one, "?") for one in types) != pattern:
        raise reader.refused("hybrid_override_pattern", pattern, f"but the layers are {types}")
    eps = reader.number("layer_norm_epsilon", 1e-5)
    for key in ("norm_eps", "rms_norm_eps"):
        reader.expect(key, eps, None)
    mtp = read_mtp(reader)
    return {
        "num_layers": len(pattern),
        "pattern": pattern,
        "moe": read_experts(reader) if "E" in pattern + mtp.pattern else MoeConfig(),
        "mtp": mtp,
        "activation": Activation.squared_relu,
        "rope_base": 0.0,
        "norm_eps": eps,
        "mamba_num_heads": reader.count("mamba_num_heads", 128),
        "mamba_head_dim": reader.count("mamba_head_dim", 64),
        "mamba_num_groups": reader.count("n_groups", reader.take("mamba_n_groups") or 8),
        "mamba_state": reader.count("ssm_state_size", 128),
        "mamba_conv": reader.count("conv_kernel", reader.take("mamba_d_conv") or 4),
        "mamba_chunk": reader.count("chunk_size", reader.take("mamba_chunk_size") or 128),
    }
