"""Nemotron-H with experts: names, settings and files of transformers, both ways."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp4.interop.logical import read_logical, write_logical
from megatron_fp4.layers.moe.config import MoeConfig, RouterScore
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import model_parameters
from megatron_fp4.models.foreign.config import transformers_config
from megatron_fp4.models.foreign.experts import BIAS, expert_tensors
from megatron_fp4.models.foreign.families import Family, family_of, from_transformers, to_transformers
from megatron_fp4.models.foreign.read_config import parse_config
from tests.interop.test_families import HYBRID, TOKENS, disturb, our_logits
from tests.models.test_count import make_decoder

EXPERTS = MoeConfig(
    num_experts=12,
    top_k=3,
    ffn_hidden=40,
    shared_ffn_hidden=72,
    latent=24,
    scaling_factor=2.5,
    num_groups=3,
    top_groups=2,
    expert_bias=True,
)
MODELS = {
    "latent, groups": replace(HYBRID, pattern="ME*-E", moe=EXPERTS),
    "width of the model": replace(
        HYBRID, pattern="ME*-E", moe=replace(EXPERTS, latent=0, num_groups=1, top_groups=1, normalize=False)
    ),
}


def random_logical(config: ModelConfig) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {p.name: 0.1 * torch.randn(p.shape) for p in model_parameters(config)}


def loaded(config: ModelConfig, state: dict[str, Tensor], folder: Path) -> Any:
    """The model of transformers that is made of files with these tensors, and complains of none."""
    from safetensors.torch import save_file

    transformers = pytest.importorskip("transformers")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(transformers_config(config, seq_length=64)))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_settings_are_read_as_they_are_written(name: str) -> None:
    """By us, and by transformers, which puts its own defaults and names beside ours."""
    config = replace(MODELS[name], head_dim=MODELS[name].attention_head_dim)
    values = transformers_config(config, seq_length=64)
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoConfig.for_model(**values)
    for source in (values, json.loads(json.dumps(values)), other.to_dict(), json.loads(other.to_json_string())):
        foreign = parse_config(source)
        assert foreign.family is Family.nemotron_h
        assert replace(foreign.config, scale_residual_init=config.scale_residual_init) == config


@pytest.mark.parametrize("name", MODELS)
def test_files_that_transformers_saves_have_our_names_and_values(name: str, tmp_path: Path) -> None:
    """It holds experts stacked, and stores them one by one."""
    from safetensors.torch import load_file

    config = MODELS[name]
    logical = random_logical(config)
    model = loaded(config, to_transformers(config, logical), tmp_path)
    stacked = model.state_dict()["model.layers.1.mixer.experts.up_proj"]
    assert torch.equal(stacked[7], logical["blocks.1.moe.experts.7.up.weight"])
    model.save_pretrained(tmp_path / "theirs")
    back = from_transformers(config, load_file(tmp_path / "theirs" / "model.safetensors"))
    assert back.keys() == logical.keys()
    assert all(torch.equal(back[key], logical[key]) for key in logical)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Both ways, with biases that decide who is chosen."""
    config = MODELS[name]
    model = make_decoder(config, "cpu")
    initialize_parameters(model, 1)
    logical = disturb(read_logical(model), 2)
    write_logical(model, logical)
    other = loaded(config, to_transformers(config, logical), tmp_path)
    with torch.no_grad():
        expected = other(TOKENS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(model, TOKENS), expected, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "score=softmax: nemotron_h has sigmoid only": {"score": RouterScore.softmax},
    "shared_ffn_hidden = 0: nemotron_h always has": {"shared_ffn_hidden": 0},
    "num_groups = 12 of model.moe.num_experts = 12": {"num_groups": 12, "top_groups": 4},
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_transformers_does_not_compute_is_refused_by_name(text: str) -> None:
    config = replace(MODELS["latent, groups"], moe=replace(EXPERTS, **REFUSED[text]))
    with pytest.raises(ValueError, match=f"no architecture of transformers computes model.moe.{text}"):
        family_of(config)


def test_what_is_not_computed_here_is_refused_by_key() -> None:
    values = transformers_config(MODELS["latent, groups"], seq_length=64)
    for key, value in {"n_shared_experts": 2, "moe_latent_size": -1, "norm_topk_prob": 1}.items():
        with pytest.raises(ValueError, match=f"{key} = {value}"):
            parse_config(values | {key: value})


def test_every_expert_is_a_tensor() -> None:
    tensors = expert_tensors(MODELS["latent, groups"])
    assert len(tensors) == 2 + 2 + 2 * 12 + 2
    assert tensors[BIAS] == ("router.bias",)
    assert tensors["experts.11.down_proj.weight"] == ("experts.11.down.weight",)


def test_published_sizes_are_read() -> None:
    """The keys of Nemotron 3 Super that say what its experts are."""
    published = transformers_config(MODELS["latent, groups"], seq_length=64) | {
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 5.0,
        "moe_shared_expert_overlap": False,
    }
    moe = parse_config(published).config.moe
    assert (moe.num_experts, moe.top_k, moe.ffn_hidden, moe.shared_ffn_hidden, moe.latent) == (
        512,
        22,
        2688,
        5376,
        1024,
    )
    assert (moe.scaling_factor, moe.expert_bias, moe.bias_rate) == (5.0, True, 0.0)
