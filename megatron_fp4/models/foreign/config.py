"""The configuration of a model as `config.json` of `transformers`; what the weights do not say.

Written for transformers 5.23, which is not imported.
"""

from __future__ import annotations

from typing import Any

from megatron_fp4.models.config import ModelConfig
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
        name = "LlamaForCausalLM" if family is Family.llama else "ArceeForCausalLM"
        return values | {
            "architectures": [name],
            "num_hidden_layers": config.num_layers,
            "rms_norm_eps": config.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        }
    kinds = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    return values | {
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": [kinds[letter] for letter in config.blocks],
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
    }
