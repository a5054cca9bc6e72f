"""Names that Megatron-LM, transformers and its Trainer give to what is a setting here: docs/names.md, and a message.

Whoever types `--tensor-model-parallel-size 8` or model.hidden_size=4096 is told the name here and, where the unit
differs, how the value is made. Where a name has no counterpart, what is done instead stands in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Counterpart:
    """setting: its key here, "" where there is none. how: what to know about the value."""

    setting: str
    how: str = ""


TOKENS = "in tokens: steps x train.global_batch x data.seq_length"
INTO_SHARDS = "text becomes token shards first: megatron-fp4 data tokenize"
PER_DEVICE = "global_batch = per device x devices / (tp pp cp) x accumulation"

COUNTERPARTS = {
    "tensor_model_parallel_size": Counterpart("parallel.tp"),
    "pipeline_model_parallel_size": Counterpart("parallel.pp"),
    "context_parallel_size": Counterpart("parallel.cp"),
    "data_parallel_size": Counterpart("parallel.dp", "0 = as many as the world leaves"),
    "num_layers_per_virtual_pipeline_stage": Counterpart("parallel.virtual_stages", "stages on each rank, not layers"),
    "sequence_parallel": Counterpart("", "always on where parallel.tp is above 1"),
    "expert_model_parallel_size": Counterpart("parallel.ep"),
    "expert_tensor_parallel_size": Counterpart("", "an expert is never divided by tp"),
    "use_distributed_optimizer": Counterpart("", "always on: ZeRO-1 over the data-parallel ranks"),
    "num_layers": Counterpart("model.num_layers"),
    "num_hidden_layers": Counterpart("model.num_layers"),
    "hidden_size": Counterpart("model.hidden"),
    "ffn_hidden_size": Counterpart("model.ffn_hidden"),
    "intermediate_size": Counterpart("model.ffn_hidden"),
    "num_attention_heads": Counterpart("model.num_heads"),
    "num_query_groups": Counterpart("model.num_kv_heads"),
    "num_key_value_heads": Counterpart("model.num_kv_heads"),
    "kv_channels": Counterpart("model.head_dim"),
    "hybrid_override_pattern": Counterpart("model.pattern"),
    "num_experts": Counterpart("model.moe.num_experts"),
    "n_routed_experts": Counterpart("model.moe.num_experts"),
    "num_local_experts": Counterpart("model.moe.num_experts"),
    "moe_router_topk": Counterpart("model.moe.top_k"),
    "num_experts_per_tok": Counterpart("model.moe.top_k"),
    "moe_ffn_hidden_size": Counterpart("model.moe.ffn_hidden"),
    "moe_intermediate_size": Counterpart("model.moe.ffn_hidden"),
    "moe_shared_expert_intermediate_size": Counterpart("model.moe.shared_ffn_hidden"),
    "moe_latent_size": Counterpart("model.moe.latent"),
    "moe_router_score_function": Counterpart("model.moe.score", "sigmoid or softmax, before the choice"),
    "norm_topk_prob": Counterpart("model.moe.normalize"),
    "moe_router_topk_scaling_factor": Counterpart("model.moe.scaling_factor"),
    "routed_scaling_factor": Counterpart("model.moe.scaling_factor"),
    "moe_router_num_groups": Counterpart("model.moe.num_groups"),
    "n_group": Counterpart("model.moe.num_groups"),
    "moe_router_group_topk": Counterpart("model.moe.top_groups"),
    "topk_group": Counterpart("model.moe.top_groups"),
    "moe_router_enable_expert_bias": Counterpart("model.moe.expert_bias"),
    "moe_router_bias_update_rate": Counterpart("model.moe.bias_rate", "with model.moe.expert_bias=true"),
    "moe_router_load_balancing_type": Counterpart(
        "", "each kind has its coefficient: model.moe.sequence_loss, global_loss"
    ),
    "moe_aux_loss_coeff": Counterpart("model.moe.sequence_loss", "or model.moe.global_loss"),
    "moe_z_loss_coeff": Counterpart("model.moe.z_loss"),
    "moe_expert_capacity_factor": Counterpart("model.moe.capacity_factor"),
    "moe_token_drop_policy": Counterpart("model.moe.drop", "weight or address; there probs or position"),
    "mtp_num_layers": Counterpart("model.mtp.depth"),
    "num_nextn_predict_layers": Counterpart("model.mtp.depth"),
    "mtp_loss_scaling_factor": Counterpart("model.mtp.loss_scale"),
    "rms_norm_eps": Counterpart("model.norm_eps"),
    "layernorm_epsilon": Counterpart("model.norm_eps"),
    "hidden_act": Counterpart("model.activation", "squared_relu or swiglu"),
    "swiglu": Counterpart("model.activation", "model.activation=swiglu"),
    "squared_relu": Counterpart("model.activation", "model.activation=squared_relu"),
    "rotary_base": Counterpart("model.rope_base"),
    "rope_theta": Counterpart("model.rope_base"),
    "rotary_percent": Counterpart("model.rope_fraction"),
    "init_method_std": Counterpart("model.init_std"),
    "initializer_range": Counterpart("model.init_std"),
    "hidden_dropout": Counterpart("model.dropout"),
    "tie_word_embeddings": Counterpart("model.tied_embeddings"),
    "untie_embeddings_and_output_weights": Counterpart("model.tied_embeddings", "the opposite; false is the default"),
    "seq_length": Counterpart("data.seq_length"),
    "max_position_embeddings": Counterpart("data.seq_length", "nothing limits positions; this is the sample's length"),
    "max_seq_length": Counterpart("data.seq_length"),
    "data_path": Counterpart("data.sources", f"data.sources=[{{name: NAME, paths: [SHARDS]}}]; {INTO_SHARDS}"),
    "tokenizer_model": Counterpart("data.tokenizer"),
    "micro_batch_size": Counterpart("train.micro_batch"),
    "global_batch_size": Counterpart("train.global_batch"),
    "per_device_train_batch_size": Counterpart("train.micro_batch", PER_DEVICE),
    "gradient_accumulation_steps": Counterpart("train.global_batch", PER_DEVICE),
    "rampup_batch_size": Counterpart("train.batch_ramp.start_samples", "with increment_samples and ramp_samples"),
    "train_iters": Counterpart("train.total_tokens", TOKENS),
    "train_samples": Counterpart("train.total_tokens", "in tokens: samples x data.seq_length"),
    "max_steps": Counterpart("train.total_tokens", TOKENS),
    "num_train_epochs": Counterpart("train.total_tokens", "in tokens; data.sources[].max_epochs bounds repetition"),
    "save": Counterpart("train.run_dir", "its folder checkpoints"),
    "load": Counterpart("train.resume", "auto goes on in train.run_dir; another run's weights are train.init_from"),
    "output_dir": Counterpart("train.run_dir"),
    "save_interval": Counterpart("train.save_interval_steps"),
    "save_steps": Counterpart("train.save_interval_steps"),
    "eval_interval": Counterpart("train.eval_interval_steps"),
    "eval_steps": Counterpart("train.eval_interval_steps"),
    "log_interval": Counterpart("train.log_interval_steps"),
    "logging_steps": Counterpart("train.log_interval_steps"),
    "exit_duration_in_mins": Counterpart("train.exit_after_seconds", "in seconds"),
    "recompute_granularity": Counterpart("train.recompute", "none, selective or full"),
    "gradient_checkpointing": Counterpart("train.recompute", "none, selective or full"),
    "lr": Counterpart("optim.lr"),
    "learning_rate": Counterpart("optim.lr"),
    "min_lr": Counterpart("optim.min_lr"),
    "lr_decay_style": Counterpart("optim.schedule", "wsd, cosine or constant"),
    "lr_scheduler_type": Counterpart("optim.schedule", "wsd, cosine or constant"),
    "lr_warmup_iters": Counterpart("optim.warmup_tokens", TOKENS),
    "warmup_steps": Counterpart("optim.warmup_tokens", TOKENS),
    "lr_wsd_decay_iters": Counterpart("optim.decay_fraction", "as a part of the run"),
    "adam_beta1": Counterpart("optim.beta1"),
    "adam_beta2": Counterpart("optim.beta2"),
    "adam_eps": Counterpart("optim.eps"),
    "clip_grad": Counterpart("optim.clip_norm"),
    "max_grad_norm": Counterpart("optim.clip_norm"),
    "bf16": Counterpart("precision", "precision=bf16"),
    "fp8_format": Counterpart("precision", "precision=fp8_paper; megatron-fp4 explain precision lists them"),
    "fp4_format": Counterpart("precision", "precision=nvfp4; megatron-fp4 explain precision lists them"),
    "wandb_exp_name": Counterpart("logging.wandb_name"),
    "report_to": Counterpart("logging.wandb", "also logging.tensorboard"),
}


def counterpart(key: str) -> str:
    """What is said about `key`, an option or a setting under its foreign name; "" for one that is not in the table."""
    name = key.lstrip("-+~").rpartition(".")[2].replace("-", "_")
    here = COUNTERPARTS.get(name)
    if here is None or here.setting == key:
        return ""
    return (
        f"{name} is called {here.setting} here" + (f" ({here.how})" if here.how else "") if here.setting else here.how
    )


def page() -> str:
    """docs/names.md."""
    return "\n".join([HEAD, *_rows(), "", FOOT])


def _rows() -> Iterator[str]:
    for name, here in COUNTERPARTS.items():
        setting = f"`{here.setting}`" if here.setting else "(none)"
        yield f"| `{name}` | {setting} | {here.how.replace('|', '/')} |"


HEAD = """# Names that you know from elsewhere

What Megatron-LM, `transformers` and its Trainer call a setting, and what it is called here. Typing one of them, as
`--train-iters 1000` or `model.hidden_size=4096`, gives the same answer. This page is what
`megatron-fp4 explain --names` prints. Whole models are read from `transformers` by `megatron-fp4 checkpoint import`
([interop.md](interop.md)).

| there | here | about the value |
|---|---|---|"""
FOOT = "---\nNext: [every setting](settings.md) · [your own YAML, sweeps](configs.md) · [all pages](README.md)"
