"""Same weights, same logits as the classes of `transformers`, in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.interop.logical import read_logical, write_logical
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.layers.rope import RopeScaling, RopeScalingConfig
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters
from megatron_fp4.models.decoder import Decoder
from megatron_fp4.models.foreign.config import transformers_config
from megatron_fp4.models.foreign.families import Family, family_of, from_transformers, to_transformers
from megatron_fp4.models.foreign.read_config import parse_config
from tests.models.test_count import ODD_HYBRID, load, make_decoder

HYBRID = replace(ODD_HYBRID, pattern="M-*M-", norm_eps=1e-4)
SWIGLU = ModelConfig(
    num_layers=2,
    hidden=48,
    ffn_hidden=80,
    num_heads=6,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=56,
    activation=Activation.swiglu,
    rope_base=5000.0,
    norm_eps=1e-4,
)
LLAMA3 = RopeScalingConfig(RopeScaling.llama3, factor=8.0, original_length=64)
YARN = RopeScalingConfig(RopeScaling.yarn, factor=4.0, original_length=64, beta_fast=4.0)
MODELS = {
    "nemotron_h": HYBRID,
    "llama": SWIGLU,
    "llama tied": replace(SWIGLU, tied_embeddings=True),
    "llama 3.1": replace(SWIGLU, rope_scaling=LLAMA3),
    "llama linear": replace(SWIGLU, rope_scaling=RopeScalingConfig(RopeScaling.linear, factor=2.5)),
    "llama yarn": replace(SWIGLU, rope_scaling=YARN),
    "mistral": replace(SWIGLU, sliding_window=5),
    "qwen2": replace(SWIGLU, qkv_bias=True, tied_embeddings=True),
    "qwen2 window": replace(SWIGLU, qkv_bias=True, sliding_window=5),
    "qwen3": replace(SWIGLU, qk_norm=QkNorm.head, rope_scaling=replace(YARN, truncate=False, attention_factor=1.2)),
    "olmo2": replace(SWIGLU, qk_norm=QkNorm.full, post_norm=True),
    "phi3": replace(SWIGLU, head_dim=8, rope_fraction=0.75, sliding_window=5),
    "arcee": replace(SWIGLU, activation=Activation.squared_relu, rope_scaling=YARN),
}
FAMILIES = {name: Family(name.split()[0]) for name in MODELS}


def theirs(config: ModelConfig) -> Any:
    transformers = pytest.importorskip("transformers")
    values = transformers_config(config, seq_length=64)
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**values)).float().eval()


def disturb(tensors: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Values away from the initial ones: norms that are all 1 would hide a swap of two of them."""
    generator = torch.Generator().manual_seed(seed)
    return {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def our_logits(model: Decoder, tokens: Tensor) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, torch.zeros_like(tokens), positions, torch.zeros_like(tokens)).view(*tokens.shape, -1)


TOKENS = torch.arange(2 * 21).view(2, 21) * 5 % 56  # 21 is not a multiple of the scan's chunk


@pytest.mark.parametrize("name", MODELS)
def test_exported_weights_give_the_same_logits(name: str) -> None:
    config = MODELS[name]
    model = make_decoder(config, "cpu")
    initialize_parameters(model, 1)
    logical = disturb(read_logical(model), 2)
    write_logical(model, logical)
    other = theirs(config)
    state = to_transformers(config, logical)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tied_embeddings else set())
    with torch.no_grad():
        expected = other(TOKENS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(model, TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_imported_weights_give_the_same_logits(name: str) -> None:
    config = MODELS[name]
    torch.manual_seed(3)
    other = theirs(config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        expected = other(TOKENS).logits
    model = make_decoder(config, "cpu")
    write_logical(model, from_transformers(config, other.state_dict()))
    torch.testing.assert_close(our_logits(model, TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_changes_no_bit(name: str) -> None:
    config = MODELS[name]
    logical = {p.name: torch.randn(p.shape) for p in model_parameters(config)}
    back = from_transformers(config, to_transformers(config, logical))
    assert set(back) == set(logical)
    assert all(torch.equal(back[key], logical[key]) for key in logical)


@pytest.mark.parametrize("name", MODELS)
def test_config_json_is_read_as_it_is_written(name: str) -> None:
    """By us, and by transformers, which puts its own defaults and names beside ours."""
    config = replace(MODELS[name], head_dim=MODELS[name].attention_head_dim)
    values = transformers_config(config, seq_length=64)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**values)
    for source in (values, json.loads(json.dumps(values)), theirs.to_dict(), json.loads(theirs.to_json_string())):
        foreign = parse_config(source)
        assert foreign.family is FAMILIES[name]
        assert replace(foreign.config, scale_residual_init=config.scale_residual_init) == config


def test_full_size_shapes_are_those_of_the_class() -> None:
    """The 12B on the meta device: a public checkpoint of it would load."""
    config = load("nemotron_h_12b")
    with torch.device("meta"):
        other = theirs(config)
        logical = {p.name: torch.empty(p.shape) for p in model_parameters(config)}
    state = to_transformers(config, logical)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in other.state_dict().items()}


def test_a_hybrid_says_its_pattern_as_servers_read_it() -> None:
    """Where it is missing, their classes have the pattern and the number of layers of another model."""
    values = transformers_config(HYBRID, seq_length=64)
    assert (values["hybrid_override_pattern"], values["num_hidden_layers"]) == ("M-*M-", 5)


def test_the_older_prefix_is_understood() -> None:
    logical = {p.name: torch.randn(p.shape) for p in model_parameters(HYBRID)}
    state = {k.replace("model.", "backbone.", 1): v for k, v in to_transformers(HYBRID, logical).items()}
    assert set(from_transformers(HYBRID, state)) == set(logical)


def test_errors_name_the_tensor() -> None:
    logical = {p.name: torch.zeros(p.shape) for p in model_parameters(HYBRID)}
    state = to_transformers(HYBRID, logical)
    with pytest.raises(ValueError, match=r"no place for 1 tensor.*mtp\.weight"):
        from_transformers(HYBRID, state | {"mtp.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mixer\.in_proj\.weight has shape"):
        from_transformers(HYBRID, state | {"model.layers.0.mixer.in_proj.weight": torch.zeros(3, 48)})
    del state["model.norm_f.weight"]
    with pytest.raises(ValueError, match=r"model\.norm_f\.weight is missing"):
        from_transformers(HYBRID, state)
    del logical["final_norm.weight"]
    with pytest.raises(ValueError, match=r"final_norm\.weight is missing"):
        to_transformers(HYBRID, logical)


def test_families() -> None:
    """What no class of transformers computes is refused instead of exported to something else."""
    assert {name: family_of(config) for name, config in MODELS.items()} == FAMILIES
    assert set(FAMILIES.values()) == set(Family)
    windowed = replace(MODELS["olmo2"], sliding_window=5)
    for config in (ODD_HYBRID, replace(HYBRID, rope_base=1e4), replace(SWIGLU, rope_base=0.0), windowed):
        with pytest.raises(ValueError, match="no architecture of transformers"):
            family_of(config)
