"""Logical tensors of a model <-> the tensors of `transformers`, in both directions.

A tensor of transformers is one logical tensor, or a few that are joined along rows. `joined_tensors` lists them for a
configuration, and the list is read both ways. Logical tensors are whole: parallel layouts are not known here.

    nemotron_h   patterns of M, * and -, squared ReLU, no position embedding
    llama        transformer blocks with RoPE and SwiGLU
    arcee        transformer blocks with RoPE and squared ReLU

Written for transformers 5.23, which is not imported.

Not here: config.json (config.py), the parameters of a model in memory (interop/logical.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

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
class FamilyNames:
    """What a family calls the parts of its model. norms, mixers: by the kind of mixer (`models.block.MIXERS`)."""

    embedding: str
    final_norm: str
    norms: dict[str, str]
    mixers: dict[str, str]


HYBRID_NAMES = FamilyNames(
    embedding="embeddings",
    final_norm="norm_f",
    norms={"attention": "norm", "mlp": "norm", "mamba": "norm"},
    mixers={"attention": "mixer", "mlp": "mixer", "mamba": "mixer"},
)
TRANSFORMER_NAMES = FamilyNames(
    embedding="embed_tokens",
    final_norm="norm",
    norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    mixers={"attention": "self_attn", "mlp": "mlp"},
)
NAMES = {
    Family.nemotron_h: HYBRID_NAMES,
    Family.llama: TRANSFORMER_NAMES,
    Family.arcee: TRANSFORMER_NAMES,
}


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


def joined_tensors(config: ModelConfig) -> Iterator[JoinedTensor]:
    """All tensors of the model, in the names of both sides."""
    names = NAMES[family_of(config)]
    yield JoinedTensor(f"model.{names.embedding}.weight", ("embedding.weight",))
    for index, letter in enumerate(config.blocks):
        for kind in MIXERS[letter]:
            ours, theirs = f"blocks.{index}.{kind}", f"model.layers.{index}"
            yield JoinedTensor(f"{theirs}.{names.norms[kind]}.weight", (f"{ours}_norm.weight",))
            for name, parts in _mixer_tensors(kind, config).items():
                joined = tuple(f"{ours}.{part}" for part in parts)
                yield JoinedTensor(f"{theirs}.{names.mixers[kind]}.{name}", joined, name == "conv1d.weight")
    yield JoinedTensor(f"model.{names.final_norm}.weight", ("final_norm.weight",))
    if not config.tied_embeddings:
        yield JoinedTensor("lm_head.weight", ("head.weight",))


def _mixer_tensors(kind: str, config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The tensors of a mixer in transformers, and what is joined in each; names within the mixer, the same for all."""
    if kind == "attention":
        projections = {f"{part}_proj.weight": (f"qkv.{part}.weight",) for part in "qkv"}
        return {**projections, "o_proj.weight": ("out.weight",)}
    if kind == "mlp":
        swiglu = {"gate_proj.weight": ("gate_up.gate.weight",), "up_proj.weight": ("gate_up.up.weight",)}
        ups = swiglu if config.activation is Activation.swiglu else {"up_proj.weight": ("up.weight",)}
        return {**ups, "down_proj.weight": ("down.weight",)}
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


def to_transformers(config: ModelConfig, logical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole logical tensors -> a state dict of transformers. Raises ValueError for a missing tensor or wrong shape."""
    for parameter in model_parameters(config):
        expect_tensor(logical, parameter.name, parameter.shape)
    return {joined.name: joined.join(logical) for joined in joined_tensors(config)}


def from_transformers(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers (also with the older prefix `backbone.`) -> whole logical tensors.

    Raises ValueError for a missing tensor, a wrong shape, or tensors that the configuration has no place for.
    """
    state = {name.replace("backbone.", "model.", 1): tensor for name, tensor in state.items()}
    shapes = {parameter.name: parameter.shape for parameter in model_parameters(config)}
    logical: dict[str, Tensor] = {}
    without_place = set(state)
    for joined in joined_tensors(config):
        logical |= joined.split(state, shapes)
        without_place.remove(joined.name)
    if config.tied_embeddings:
        without_place.discard("lm_head.weight")
    if without_place:
        names = ", ".join(sorted(without_place)[:5])
        raise ValueError(f"the model has no place for {len(without_place)} tensor(s): {names}")
    return logical
