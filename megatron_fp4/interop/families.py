"""Weights and configuration to and from `transformers`, by logical names.

One idea: an entry says which logical tensors, joined along rows, one tensor of transformers is. The list of entries is
derived from the configuration and read in both directions. Nothing here imports transformers, and nothing knows of
parallel layouts: logical tensors are whole.

    nemotron_h   patterns of M, * and -, squared ReLU, no position embedding
    llama        transformer blocks with RoPE and SwiGLU
    arcee        transformer blocks with RoPE and squared ReLU

Written for transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fp4.comm.parameter import logical_parameters
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.models.block import MIXERS
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters


class Family(Enum):
    """`model_type` in transformers."""

    nemotron_h = "nemotron_h"
    llama = "llama"
    arcee = "arcee"


@dataclass(frozen=True)
class Entry:
    """A tensor of transformers and the logical tensors that it joins along rows. middle: it is `[rows, 1, columns]`."""

    theirs: str
    ours: tuple[str, ...]
    middle: bool = False


def family_of(config: ModelConfig) -> Family:
    """The architecture of transformers that computes the same. Raises ValueError with what stands in the way."""
    squared = config.activation is Activation.squared_relu
    if set(config.blocks) == {"T"} and config.rope_base:
        return Family.arcee if squared else Family.llama
    if "T" not in config.blocks and squared and not config.rope_base and not config.tied_embeddings:
        return Family.nemotron_h
    raise ValueError(
        f"no architecture of transformers computes pattern {config.pattern or 'T' * config.num_layers!r} with"
        f" activation={config.activation.name}, rope_base={config.rope_base:g}, tied_embeddings="
        f"{config.tied_embeddings}: T blocks need rope_base > 0 (llama, arcee); M, * and - need squared_relu,"
        " rope_base = 0 and an untied head (nemotron_h)"
    )


def entries_of(config: ModelConfig) -> list[Entry]:
    """All tensors of the model, in the names of both sides."""
    hybrid = family_of(config) is Family.nemotron_h
    table, norm = ("embeddings", "norm_f") if hybrid else ("embed_tokens", "norm")
    found = [Entry(f"model.{table}.weight", ("embedding.weight",))]
    for index, letter in enumerate(config.blocks):
        for mixer in MIXERS[letter]:
            name, theirs = f"blocks.{index}.{mixer}", f"model.layers.{index}"
            before = {"attention": "input_layernorm", "mlp": "post_attention_layernorm"}
            inside = {"attention": "self_attn", "mlp": "mlp"}
            found.append(Entry(f"{theirs}.{'norm' if hybrid else before[mixer]}.weight", (f"{name}_norm.weight",)))
            found += _mixer_entries(mixer, config, name, f"{theirs}.{'mixer' if hybrid else inside[mixer]}")
    found.append(Entry(f"model.{norm}.weight", ("final_norm.weight",)))
    if not config.tied_embeddings:
        found.append(Entry("lm_head.weight", ("head.weight",)))
    return found


def _mixer_entries(mixer: str, config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    if mixer == "attention":
        projections = [Entry(f"{theirs}.{part}_proj.weight", (f"{ours}.qkv.{part}.weight",)) for part in "qkv"]
        return [*projections, Entry(f"{theirs}.o_proj.weight", (f"{ours}.out.weight",))]
    if mixer == "mlp":
        gated = config.activation is Activation.swiglu
        ups = {"gate_proj": "gate_up.gate", "up_proj": "gate_up.up"} if gated else {"up_proj": "up"}
        parts = {**ups, "down_proj": "down"}
        return [Entry(f"{theirs}.{part}.weight", (f"{ours}.{name}.weight",)) for part, name in parts.items()]
    conv = {kind: tuple(f"{ours}.conv.{part}.{kind}" for part in "xBC") for kind in ("weight", "bias")}
    return [
        Entry(
            f"{theirs}.in_proj.weight", tuple(f"{ours}.in_proj.{part}.weight" for part in ("z", "x", "B", "C", "dt"))
        ),
        Entry(f"{theirs}.conv1d.weight", conv["weight"], middle=True),
        Entry(f"{theirs}.conv1d.bias", conv["bias"]),
        *(Entry(f"{theirs}.{part}", (f"{ours}.{part}",)) for part in ("A_log", "dt_bias", "D", "norm.weight")),
        Entry(f"{theirs}.out_proj.weight", (f"{ours}.out_proj.weight",)),
    ]


def to_transformers(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole logical tensors -> a state dict of transformers. Raises ValueError for a missing tensor or wrong shape."""
    shapes = {parameter.name: parameter.shape for parameter in model_parameters(config)}
    found = {}
    for entry in entries_of(config):
        for name in entry.ours:
            _check(name, tensors.get(name), shapes[name])
        joined = torch.cat([tensors[name] for name in entry.ours])
        found[entry.theirs] = joined[:, None] if entry.middle else joined
    return found


def from_transformers(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers (also with the older prefix `backbone.`) -> whole logical tensors.

    Raises ValueError for a missing tensor, a wrong shape, or tensors that the configuration has no place for.
    """
    state = {name.replace("backbone.", "model.", 1): tensor for name, tensor in state.items()}
    shapes = {parameter.name: parameter.shape for parameter in model_parameters(config)}
    found: dict[str, Tensor] = {}
    for entry in entries_of(config):
        rows, tail = [shapes[name][0] for name in entry.ours], shapes[entry.ours[0]][1:]
        tensor = state.pop(entry.theirs, None)
        tensor = _check(entry.theirs, tensor, (sum(rows), *((1,) if entry.middle else ()), *tail))
        parts = (tensor[:, 0] if entry.middle else tensor).split(rows)
        found |= dict(zip(entry.ours, parts, strict=True))
    if config.tied_embeddings:
        state.pop("lm_head.weight", None)
    if state:
        raise ValueError(f"the model has no place for {len(state)} tensor(s): {', '.join(sorted(state)[:5])}")
    return found


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if tensor is None:
        raise ValueError(f"tensor {name} is missing; it should have shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, the model's configuration says {shape}")
    return tensor


def read_logical(model: nn.Module) -> dict[str, Tensor]:
    """The logical tensors of a model that one process holds whole. Raises ValueError for a part of one."""
    found: dict[str, Tensor] = {}
    for parameter in logical_parameters(model):
        for rows, where in parameter.placement.pieces():
            found[where.name] = _check(where.name, parameter.detach()[rows], where.global_shape)
    return found


@torch.no_grad()
def write_logical(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a model, or the part of it on this rank, from whole logical tensors. Raises ValueError if one is missing."""
    for parameter in logical_parameters(model):
        for rows, where in parameter.placement.pieces():
            logical = _check(where.name, tensors.get(where.name), where.global_shape)
            parameter[rows].copy_(logical[where.slices])


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
