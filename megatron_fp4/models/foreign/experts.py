"""Mixtures of experts and multi-token prediction of a Nemotron-H, against the names and keys of others.

    ours, in blocks.N.moe           theirs, in model.layers.N.mixer
    router.weight, router.bias      gate.weight, gate.e_score_correction_bias
    latent.down, latent.up          fc1_latent_proj, fc2_latent_proj
    experts.7.up, experts.7.down    experts.7.up_proj, experts.7.down_proj
    shared.up, shared.down          shared_experts.up_proj, shared_experts.down_proj

In files every expert has tensors of its own; transformers 5.23 stacks them when it loads, and takes them apart when it
saves. Layers for further tokens (`mtp.`) it leaves unread: their names are those of Megatron-Bridge and of vLLM's
nemotron_h_mtp.py, where the layers of all depths are counted in one row.

Not here: the other blocks (families.py), the other keys (config.py, read_config.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_fp4.layers.moe.config import MoeConfig, RouterScore
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.values import ForeignValues
from megatron_fp4.models.mtp.config import MtpConfig

LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
"""What transformers calls a block."""
BIAS = "gate.e_score_correction_bias"


def expert_tensors(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The tensors of a mixture of experts in files, and the logical tensor that each is; names within the mixer."""
    moe = config.moe
    tensors: dict[str, tuple[str, ...]] = {"gate.weight": ("router.weight",)}
    if moe.expert_bias:
        tensors[BIAS] = ("router.bias",)
    if moe.latent:
        tensors |= {"fc1_latent_proj.weight": ("latent.down.weight",), "fc2_latent_proj.weight": ("latent.up.weight",)}
    for expert in range(moe.num_experts):
        for name in ("up", "down"):
            tensors[f"experts.{expert}.{name}_proj.weight"] = (f"experts.{expert}.{name}.weight",)
    for name in ("up", "down"):
        tensors[f"shared_experts.{name}_proj.weight"] = (f"shared.{name}.weight",)
    return tensors


def mtp_modules(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """(theirs, ours) of what stands around the blocks of a depth: two norms and a projection before, a norm behind."""
    length = len(config.mtp.pattern)
    for depth in range(config.mtp.num_sequences):
        first, last = f"mtp.layers.{depth * length}", f"mtp.layers.{(depth + 1) * length - 1}"
        yield f"{first}.enorm", f"mtp.{depth}.norm_embedding"
        yield f"{first}.hnorm", f"mtp.{depth}.norm_hidden"
        yield f"{first}.eh_proj", f"mtp.{depth}.projection"
        yield f"{last}.final_layernorm", f"mtp.{depth}.final_norm"


def mtp_layers(config: ModelConfig) -> Iterator[tuple[str, str, str]]:
    """(theirs, ours, letter) of the blocks of all depths."""
    length = len(config.mtp.pattern)
    for depth in range(config.mtp.num_sequences):
        for index, letter in enumerate(config.mtp.pattern):
            yield f"mtp.layers.{depth * length + index}", f"mtp.{depth}.blocks.{index}", letter


def objection_to_experts(config: ModelConfig) -> str:
    """Why no class of transformers computes the experts of a model; "" if one does, or there are none."""
    moe = config.moe
    if not moe.num_experts:
        return ""
    if moe.score is not RouterScore.sigmoid:
        return f"model.moe.score={moe.score.name}: nemotron_h has sigmoid only"
    if not moe.shared_ffn_hidden:
        return "model.moe.shared_ffn_hidden = 0: nemotron_h always has a shared expert"
    if moe.num_experts // moe.num_groups < 2:
        return (
            f"model.moe.num_groups = {moe.num_groups} of model.moe.num_experts = {moe.num_experts}: nemotron_h adds up"
            " the two best scores of a group, and one of a single expert has not two"
        )
    return ""


def expert_values(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of experts and of further tokens; nothing where a model has neither."""
    moe, mtp = config.moe, config.mtp
    values: dict[str, Any] = {}
    if moe.num_experts:
        values |= {
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.ffn_hidden,
            "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden,
            "n_shared_experts": 1,  # vLLM multiplies the size by it, transformers does not
            "moe_latent_size": moe.latent or None,
            "norm_topk_prob": moe.normalize,
            "routed_scaling_factor": moe.scaling_factor,
            "n_group": moe.num_groups,
            "topk_group": moe.top_groups,
        }
    if mtp.depth:
        values |= {
            "num_nextn_predict_layers": mtp.num_sequences,  # those that are stored
            "mtp_hybrid_override_pattern": mtp.pattern,
            "mtp_layers_block_type": [LETTERS[letter] for letter in mtp.pattern],
            "mtp_use_repeated_layer": mtp.shared,
        }
    return values


def read_experts(reader: ForeignValues) -> MoeConfig:
    """The experts of a Nemotron-H; what config.json does not say is training's: losses, and how the bias moves."""
    reader.expect("n_shared_experts", 1, None, default=1)
    latent = reader.take("moe_latent_size")
    if latent is not None and (type(latent) is not int or latent < 1):
        raise reader.refused("moe_latent_size", latent, "neither null nor a positive whole number")
    normalize = reader.take("norm_topk_prob", True)
    if not isinstance(normalize, bool):
        raise reader.refused("norm_topk_prob", normalize, "neither true nor false")
    return MoeConfig(
        num_experts=reader.count("n_routed_experts", reader.take("num_local_experts") or 8),
        top_k=reader.count("num_experts_per_tok", 2),
        ffn_hidden=reader.count("moe_intermediate_size", 7688),
        shared_ffn_hidden=reader.count("moe_shared_expert_intermediate_size", 7688),
        latent=latent or 0,
        normalize=normalize,
        scaling_factor=reader.number("routed_scaling_factor", 1.0),
        num_groups=reader.count("n_group", 1),
        top_groups=reader.count("topk_group", 1),
        expert_bias=True,
    )


def read_mtp(reader: ForeignValues) -> MtpConfig:
    """The layers for further tokens that the files hold."""
    depth = reader.take("num_nextn_predict_layers", 0)
    if type(depth) is not int or depth < 0:
        raise reader.refused("num_nextn_predict_layers", depth, "no whole number")
    if not depth:
        return MtpConfig()
    pattern, types = reader.take("mtp_hybrid_override_pattern"), reader.strings("mtp_layers_block_type")
    if not isinstance(pattern, str | None):
        raise reader.refused("mtp_hybrid_override_pattern", pattern, "no word")
    names = {name: letter for letter, name in LETTERS.items()} | {"attention": "*", "mamba": "M"}
    if types is not None and not set(types) <= names.keys():
        raise reader.refused("mtp_layers_block_type", types, f"this model has {', '.join(names)}")
    from_types = "".join(names[one] for one in types) if types else None
    if None not in (pattern, from_types) and pattern != from_types:
        raise reader.refused("mtp_hybrid_override_pattern", pattern, f"but the layers are {types}")
    reader.take("mtp_use_repeated_layer")  # what is stored is stored once either way
    return MtpConfig(depth=depth, pattern=pattern or from_types or "*E")
