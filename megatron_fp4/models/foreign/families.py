"""Logical tensors of a model <-> the tensors of `transformers`, in both directions.

A tensor of transformers is one logical tensor, or a few that are joined along rows. `joined_tensors` lists them for a
configuration, and the list is read both ways. Logical tensors are whole: parallel layouts are not known here.

    nemotron_h   patterns of M, *, - and E, squared ReLU, no position embedding
    llama        transformer blocks with RoPE and SwiGLU
    mistral      a sliding window                        (what each has beside llama)
    qwen2        biases of queries, keys and values
    qwen3        QK-norm of each head
    olmo2        QK-norm over all heads, norms behind the mixers
    phi3         a part of each head rotated; fused names
    arcee        squared ReLU

Written for transformers 5.23, which is not imported.

Not here: the tensors of a mixer (mixers.py), config.json (config.py), the parameters of a model in memory
(interop/logical.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.layers.rope import RopeScaling
from megatron_fp4.models.block import MIXERS
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters
from megatron_fp4.models.foreign.experts import mtp_layers, mtp_modules, objection_to_experts
from megatron_fp4.models.foreign.mixers import mixer_tensors


class Family(Enum):
    """`model_type` in transformers."""

    nemotron_h = "nemotron_h"
    llama = "llama"
    mistral = "mistral"
    qwen2 = "qwen2"
    qwen3 = "qwen3"
    olmo2 = "olmo2"
    phi3 = "phi3"
    arcee = "arcee"


@dataclass(frozen=True)
class FamilyNames:
    """What a family calls the parts of its model. norms, mixers: by the kind of mixer (`models.block.MIXERS`)."""

    embedding: str
    final_norm: str
    norms: dict[str, str]
    mixers: dict[str, str]


HYBRID_NAMES = FamilyNames(
    embedding="embeddings",
    final_norm="norm_f",
    norms=dict.fromkeys(("attention", "mlp", "mamba", "moe"), "norm"),
    mixers=dict.fromkeys(("attention", "mlp", "mamba", "moe"), "mixer"),
)
TRANSFORMER_NAMES = FamilyNames(
    embedding="embed_tokens",
    final_norm="norm",
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    mixers={"attention": "self_attn", "mlp": "mlp"},
)
POST_NORM_NAMES = replace(
    TRANSFORMER_NAMES, norms={"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
)
NAMES = {Family.nemotron_h: HYBRID_NAMES, Family.olmo2: POST_NORM_NAMES}
"""Of the others, TRANSFORMER_NAMES."""


@dataclass(frozen=True)
class FamilyFeatures:
    """What a family computes beside transformer blocks with RoPE. needs: always. may: where its config.json says so."""

    needs: frozenset[str]
    may: frozenset[str] = frozenset()

    def fit(self, features: set[str]) -> bool:
        return self.needs <= features <= self.needs | self.may


WINDOW = "sliding_window > 0"
SCALED = "rope_scaling"
FEATURES = {
    Family.llama: FamilyFeatures(frozenset(), frozenset({SCALED})),
    Family.mistral: FamilyFeatures(frozenset({WINDOW}), frozenset({SCALED})),
    Family.qwen2: FamilyFeatures(frozenset({"qkv_bias=true"}), frozenset({WINDOW, SCALED})),
    Family.qwen3: FamilyFeatures(frozenset({"qk_norm=head"}), frozenset({WINDOW, SCALED})),
    Family.olmo2: FamilyFeatures(frozenset({"qk_norm=full", "post_norm=true"}), frozenset({SCALED})),
    Family.phi3: FamilyFeatures(frozenset({"rope_fraction < 1"}), frozenset({WINDOW})),
    Family.arcee: FamilyFeatures(frozenset({"activation=squared_relu"}), frozenset({SCALED})),
}


def features_of(config: ModelConfig) -> set[str]:
    """What a model has beside transformer blocks with RoPE and SwiGLU, as settings."""
    present = {
        "activation=squared_relu": config.activation is Activation.squared_relu,
        WINDOW: bool(config.sliding_window),
        SCALED: config.rope_scaling.kind is not RopeScaling.none,
        "rope_fraction < 1": config.rope_fraction < 1,
        "qkv_bias=true": config.qkv_bias,
        f"qk_norm={config.qk_norm.name}": config.qk_norm is not QkNorm.none,
        "post_norm=true": config.post_norm,
    }
    return {feature for feature, has in present.items() if has}


def family_of(config: ModelConfig) -> Family:
    """The architecture of transformers that computes the same. Raises ValueError with what stands in the way."""
    features = features_of(config)
    if objection := objection_to_experts(config):
        raise ValueError(f"no architecture of transformers computes {objection}")
    if set(config.blocks) == {"T"} and config.rope_base:
        for family, known in FEATURES.items():
            if known.fit(features):
                return family
    hybrid = "T" not in config.blocks and features == {"activation=squared_relu"}
    if hybrid and not config.rope_base and not config.tied_embeddings:
        return Family.nemotron_h
    listed = "; ".join(f"{family.value}: {' and '.join(sorted(f.needs)) or 'swiglu'}" for family, f in FEATURES.items())
    raise ValueError(
        f"no architecture of transformers computes pattern {config.pattern or 'T' * config.num_layers!r} with"
        f" rope_base={config.rope_base:g}, tied_embeddings={config.tied_embeddings} and"
        f" {', '.join(sorted(features)) or 'nothing else'}: T blocks need rope_base > 0 and one of these ({listed}); M,"
        " *, - and E need squared_relu, rope_base = 0 and an untied head (nemotron_h)"
    )


def expect_tensor(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor `name`. Raises ValueError if it is missing or has another shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise ValueError(f"tensor {name} is missing; it should have shape {shape}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"tensor {name} has shape {tuple(tensor.shape)}, the model's configuration says {shape}")
    return tensor


@dataclass(frozen=True)
class JoinedTensor:
    """One tensor of transformers: the logical tensors `parts`, joined along rows.

    channel_dim: transformers has a dimension of size 1 after the rows, as its depthwise convolutions do.
    """

    name: str
    parts: tuple[str, ...]
    channel_dim: bool = False

    def join(self, logical: Mapping[str, Tensor]) -> Tensor:
        """The tensor of transformers."""
        joined = torch.cat([logical[part] for part in self.parts])
        return joined[:, None] if self.channel_dim else joined

    def split(self, state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The logical tensors, of the given shapes. Raises ValueError if the tensor is missing or does not fit."""
        rows = [shapes[part][0] for part in self.parts]
        columns = shapes[self.parts[0]][1:]
        joined = expect_tensor(state, self.name, (sum(rows), *((1,) if self.channel_dim else ()), *columns))
        pieces = (joined[:, 0] if self.channel_dim else joined).split(rows)
        return dict(zip(self.parts, pieces, strict=True))


def joined_tensors(config: ModelConfig, family: Family | None = None) -> Iterator[JoinedTensor]:
    """All tensors of the model, in the names of both sides. family: whose names; None for that of `family_of`."""
    family = family or family_of(config)
    names = NAMES.get(family, TRANSFORMER_NAMES)
    yield JoinedTensor(f"model.{names.embedding}.weight", ("embedding.weight",))
    for index, letter in enumerate(config.blocks):
        for kind in MIXERS[letter]:
            tensors = mixer_tensors(kind, config, fused=family is Family.phi3)
            yield from _residual_tensors(f"model.layers.{index}", f"blocks.{index}", kind, names, tensors)
    yield JoinedTensor(f"model.{names.final_norm}.weight", ("final_norm.weight",))
    if not config.tied_embeddings:
        yield JoinedTensor("lm_head.weight", ("head.weight",))
    for theirs, ours in mtp_modules(config):
        yield JoinedTensor(f"{theirs}.weight", (f"{ours}.weight",))
    for theirs, ours, letter in mtp_layers(config):
        for kind in MIXERS[letter]:
            yield from _residual_tensors(theirs, ours, kind, names, mixer_tensors(kind, config, fused=False))


def _residual_tensors(
    theirs: str, ours: str, kind: str, names: FamilyNames, tensors: Mapping[str, tuple[str, ...]]
) -> Iterator[JoinedTensor]:
    """Norm and mixer of one residual. tensors: those of the mixer."""
    yield JoinedTensor(f"{theirs}.{names.norms[kind]}.weight", (f"{ours}.{kind}_norm.weight",))
    for name, parts in tensors.items():
        joined = tuple(f"{ours}.{kind}.{part}" for part in parts)
        yield JoinedTensor(f"{theirs}.{names.mixers[kind]}.{name}", joined, name == "conv1d.weight")


def to_transformers(config: ModelConfig, logical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole logical tensors -> a state dict of transformers. Raises ValueError for a missing tensor or wrong shape."""
    for parameter in model_parameters(config):
        expect_tensor(logical, parameter.name, parameter.shape)
    return {joined.name: joined.join(logical) for joined in joined_tensors(config)}


def from_transformers(
    config: ModelConfig, state: Mapping[str, Tensor], family: Family | None = None
) -> dict[str, Tensor]:
    """A state dict of transformers (also with the older prefix `backbone.`) -> whole logical tensors.

    Raises ValueError for a missing tensor, a wrong shape, or tensors that the configuration has no place for.
    """
    state = {name.replace("backbone.", "model.", 1): tensor for name, tensor in state.items()}
    shapes = {parameter.name: parameter.shape for parameter in model_parameters(config)}
    logical: dict[str, Tensor] = {}
    without_place = set(state)
    for joined in joined_tensors(config, family):
        logical |= joined.split(state, shapes)
        without_place.remove(joined.name)
    if config.tied_embeddings:
        without_place.discard("lm_head.weight")
    if without_place:
        names = ", ".join(sorted(without_place)[:5])
        raise ValueError(f"the model has no place for {len(without_place)} tensor(s): {names}")
    return logical
