"""config.json of others: what this model computes is read right, everything else is refused by its name and value."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_fp4.layers.rope import RopeScaling, RopeScalingConfig
from megatron_fp4.models.foreign.families import Family
from megatron_fp4.models.foreign.read_config import parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 128000,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
LLAMA_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def refusal(**keys: Any) -> str:
    with pytest.raises(ValueError, match=r"^config\.json") as error:
        parse_config(LLAMA | keys)
    return str(error.value)


def test_llama_3_1_as_it_was_published() -> None:
    """transformers 4's dialect. Its scaling was left out: logits off by as much as they are large."""
    config = parse_config(LLAMA | {"rope_scaling": LLAMA_3_1}).config
    assert config.rope_scaling == RopeScalingConfig(RopeScaling.llama3, factor=8.0, original_length=8192)
    assert (config.rope_base, config.attention_head_dim, config.norm_eps) == (500000.0, 128, 1e-5)
    new = {"rope_parameters": LLAMA_3_1 | {"rope_theta": 500000.0}}
    assert parse_config({**LLAMA, **new}).config == config
    assert parse_config({**LLAMA, **new, "rope_scaling": LLAMA_3_1}).config == config, "both dialects in one file"


def test_mistral_has_a_window_unless_it_says_null() -> None:
    mistral = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert parse_config(mistral).config.sliding_window == 4096, "what the class takes for a missing key"
    assert parse_config(mistral | {"sliding_window": 1024}).config.sliding_window == 1024
    none = parse_config(mistral | {"sliding_window": None})
    assert (none.config.sliding_window, none.family) == (0, Family.mistral)


def test_qwen_2_whose_window_is_switched_off() -> None:
    """use_sliding_window is false in all published ones, and sliding_window is a number."""
    qwen = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 32768}
    qwen |= {"max_window_layers": 28, "use_sliding_window": False}
    assert parse_config(qwen).config.sliding_window == 0
    with pytest.raises(ValueError, match=r"sliding_window = 32768, in 4 of 32 layers; this model has one in all"):
        parse_config(qwen | {"use_sliding_window": True})


@pytest.mark.parametrize("kind", ["smollm3", "granite", "gemma", "gemma2", "gpt2", None])
def test_other_models(kind: str | None) -> None:
    """Taken for a Llama today, because their tensors have its names."""
    assert f"model_type = {kind!r}, which this model does not compute; it computes nemotron_h, llama" in refusal(
        model_type=kind
    )


def test_what_a_llama_may_say_and_this_model_does_not_compute() -> None:
    assert "hidden_act = 'gelu', which this model does not compute; it computes 'silu'" in refusal(hidden_act="gelu")
    assert "attention_bias = True" in refusal(attention_bias=True)
    assert "mlp_bias = True" in refusal(mlp_bias=True)
    assert "attention_dropout = 0.1" in refusal(attention_dropout=0.1)
    assert "sliding_window = 4096" in refusal(sliding_window=4096)
    assert "hidden_size = None, no positive whole number" in refusal(hidden_size=None)
    assert "architectures = ['LlamaForSequenceClassification']" in refusal(
        architectures=["LlamaForSequenceClassification"]
    )
    assert "quantization_config = {'quant_method': 'gptq'}" in refusal(quantization_config={"quant_method": "gptq"})
    assert "auto_map" in refusal(auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    assert "rope_type = 'dynamic'" in refusal(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "rope_theta = 500000.0, but rope_parameters has 10000.0" in refusal(rope_parameters={"rope_theta": 10000.0})
    assert "partial_rotary_factor = 0.5" in refusal(partial_rotary_factor=0.5)
    assert "low_freq_factor = None, no number" in refusal(rope_scaling={"rope_type": "llama3", "factor": 8.0})


def test_keys_that_nobody_knows() -> None:
    """SmolLM3's and Granite's in the clothes of a Llama: each by its name, with the value."""
    text = refusal(no_rope_layers=[1, 1, 1, 0], embedding_multiplier=12.0)
    assert "nothing is known of embedding_multiplier = 12.0, no_rope_layers = [1, 1, 1, 0];" in text
    assert "rope_scaling: nothing is known of beta = 3" in refusal(rope_scaling=LLAMA_3_1 | {"beta": 3})
    parse_config(LLAMA | {"temperature": 0.6, "_name_or_path": "x", "id2label": {"0": "a"}, "pretraining_tp": 1})


def test_sizes_that_contradict_each_other_are_the_files_fault() -> None:
    assert "config.json describes a model that this one cannot be: model.num_heads = 32 is not a multiple" in refusal(
        num_key_value_heads=5
    )


def test_nemotron_h_as_it_was_published() -> None:
    published = {
        "architectures": ["NemotronHForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM"},
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M-M*-",
        "attention_head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 5,
        "vocab_size": 131072,
        "rms_norm_eps": 1e-05,
        "layer_norm_epsilon": 1e-05,
        "mlp_hidden_act": "relu2",
        "mamba_num_heads": 128,
        "n_groups": 8,
        "expand": 2,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "use_bias": False,
    }
    config = parse_config(published).config
    assert (config.pattern, config.head_dim, config.mamba_num_groups, config.rope_base) == ("M-M*-", 128, 8, 0.0)
    moe = parse_config(published | {"hybrid_override_pattern": "MEM*E"}).config.moe
    assert (moe.num_experts, moe.top_k, moe.ffn_hidden) == (8, 2, 7688), "the defaults of the class"
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers = -1, no whole number"):
        parse_config(published | {"num_nextn_predict_layers": -1})
