"""The configuration of a model as `config.json` of `transformers`; what the weights do not say.

Written for transformers 5.23, which is not imported.
"""

from __future__ import annotations

from typing import Any

from megatron_fp4.layers.rope import RopeScaling
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.experts import LETTERS, expert_values
from megatron_fp4.models.foreign.families import Family, family_of


def transformers_config(config: ModelConfig, *, seq_length: int) -> dict[str, Any]:
    """The values of `config.json` for an exported model."""
    family = family_of(config)
    values: dict[str, Any] = {
        "model_type": family.value,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn_hidden,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.attention_head_dim,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.init_std,
        "max_position_embeddings": seq_length,
    }
    if family is not Family.nemotron_h:
        return values | _transformer_values(config, family, seq_length)
    return values | {
        "architectures": [CLASS_NAMES[family]],
        "layers_block_type": [LETTERS[letter] for letter in config.blocks],
        # vLLM and TensorRT-LLM read these, and the defaults of their classes are those of another model
        "hybrid_override_pattern": config.blocks,
        "num_hidden_layers": len(config.blocks),
        "layer_norm_epsilon": config.norm_eps,
        "mamba_num_heads": config.mamba_num_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "n_groups": config.mamba_num_groups,
        "ssm_state_size": config.mamba_state,
        "conv_kernel": config.mamba_conv,
        "chunk_size": config.mamba_chunk,
        # transformers 5.23 clamps the step sizes to at least this, which training does not; the class default of 0.001
        # would change the logits. Not 0: its initialization takes the logarithm.
        "time_step_min": 1e-30,
        **expert_values(config),
    }


CLASS_NAMES = {
    Family.nemotron_h: "NemotronHForCausalLM",
    Family.llama: "LlamaForCausalLM",
    Family.mistral: "MistralForCausalLM",
    Family.qwen2: "Qwen2ForCausalLM",
    Family.qwen3: "Qwen3ForCausalLM",
    Family.olmo2: "Olmo2ForCausalLM",
    Family.phi3: "Phi3ForCausalLM",
    Family.arcee: "ArceeForCausalLM",
}


def _transformer_values(config: ModelConfig, family: Family, seq_length: int) -> dict[str, Any]:
    """What config.json says of a model of T blocks."""
    window = config.sliding_window or None
    values: dict[str, Any] = {
        "architectures": [CLASS_NAMES[family]],
        "hidden_act": "relu2" if family is Family.arcee else "silu",
        "num_hidden_layers": config.num_layers,
        "pad_token_id": None,  # the class of Phi 3 has one that a smaller vocabulary has not
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope_parameters(config),
    }
    if family in (Family.mistral, Family.phi3):
        values["sliding_window"] = window
    if family in (Family.qwen2, Family.qwen3):
        kind = "sliding_attention" if window else "full_attention"
        values |= {"use_sliding_window": bool(window), "sliding_window": window, "max_window_layers": 0}
        values["layer_types"] = [kind] * config.num_layers
    if config.rope_scaling.original_length:
        longest = int(config.rope_scaling.original_length * config.rope_scaling.factor)
        values["max_position_embeddings"] = max(seq_length, longest)
    return values


def rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters` of config.json."""
    scaling, kind = config.rope_scaling, config.rope_scaling.kind
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_fraction < 1:
        values["partial_rotary_factor"] = config.rope_fraction
    if kind is RopeScaling.none:
        return values
    values |= {"rope_type": kind.name, "factor": scaling.factor}
    if kind is not RopeScaling.linear:
        values["original_max_position_embeddings"] = scaling.original_length
    if kind is RopeScaling.llama3:
        values |= {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
    if kind is RopeScaling.yarn:
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        if scaling.attention_factor:
            values["attention_factor"] = scaling.attention_factor
    return values
