"""Layers for further tokens in files: the names of vLLM's nemotron_h_mtp.py and of Megatron-Bridge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.foreign.config import transformers_config
from megatron_fp4.models.foreign.families import from_transformers, to_transformers
from megatron_fp4.models.foreign.read_config import parse_config
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.train.resume.same_model import differences_from
from tests.interop.test_experts import MODELS, loaded, random_logical

TWO = replace(MODELS["latent, groups"], mtp=MtpConfig(depth=2, pattern="*E"))
SHARED = replace(TWO, mtp=replace(TWO.mtp, shared=True))


@pytest.mark.parametrize("config", [TWO, SHARED], ids=["two", "shared"])
def test_names_and_values_survive(config: ModelConfig, tmp_path: Path) -> None:
    """transformers leaves them unread, and loads the rest without a complaint."""
    logical = random_logical(config)
    state = to_transformers(config, logical)
    layers = sorted({name.split(".")[2] for name in state if name.startswith("mtp.")})
    assert layers == (["0", "1"] if config.mtp.shared else ["0", "1", "2", "3"])
    first, last = f"mtp.layers.{layers[-2]}", f"mtp.layers.{layers[-1]}"
    depth = len(layers) // 2 - 1
    for theirs, ours in {
        f"{first}.enorm": "norm_embedding",
        f"{first}.hnorm": "norm_hidden",
        f"{first}.eh_proj": "projection",
        f"{last}.final_layernorm": "final_norm",
        f"{first}.mixer.o_proj": "blocks.0.attention.out",
        f"{last}.norm": "blocks.1.moe_norm",
        f"{last}.mixer.experts.11.down_proj": "blocks.1.moe.experts.11.down",
    }.items():
        assert torch.equal(state[f"{theirs}.weight"], logical[f"mtp.{depth}.{ours}.weight"])
    assert torch.equal(
        state[f"{last}.mixer.gate.e_score_correction_bias"], logical[f"mtp.{depth}.blocks.1.moe.router.bias"]
    )
    loaded(config, state, tmp_path)
    run = replace(config, head_dim=config.attention_head_dim)
    assert not differences_from(tmp_path, run), (
        "a run of two depths that share their blocks may begin with one sequence"
    )
    assert "model.mtp.depth" in differences_from(tmp_path, replace(run, mtp=MtpConfig(depth=3, pattern="*E")))
    back = from_transformers(config, state)
    assert back.keys() == logical.keys()
    assert all(torch.equal(back[key], logical[key]) for key in logical)


def test_settings_say_what_is_stored() -> None:
    """A shared sequence is stored once, and which depths it serves is the run's."""
    values = json.loads(json.dumps(transformers_config(SHARED, seq_length=64)))
    assert (values["num_nextn_predict_layers"], values["mtp_hybrid_override_pattern"]) == (1, "*E")
    assert parse_config(values).config.mtp == MtpConfig(depth=1, pattern="*E")
    values = transformers_config(TWO, seq_length=64)
    assert parse_config(values).config.mtp == TWO.mtp
    with pytest.raises(ValueError, match="mtp_hybrid_override_pattern = 'E', but the layers are"):
        parse_config(values | {"mtp_hybrid_override_pattern": "E"})
