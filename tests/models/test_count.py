"""Parameters against the real modules and the known totals; FLOPs against torch's counter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_fp4.comm.mesh import Group, ParallelMesh
from megatron_fp4.layers import lab
from megatron_fp4.layers.layer_context import LayerContext
from megatron_fp4.layers.linear import linears_of
from megatron_fp4.layers.mlp import Activation
from megatron_fp4.layers.parameter import initialize_parameters
from megatron_fp4.layers.qk_norm import QkNorm
from megatron_fp4.models.config import ModelConfig
from megatron_fp4.models.count import (
    by_kind,
    count_flops,
    model_parameters,
    quantized_parameters,
    stage_parameters,
)
from megatron_fp4.models.decoder import Decoder, whole_model
from megatron_fp4.models.partition import split_stages
from megatron_fp4.precision import EmulatedBackend, StepClock

CONFIGS = Path(__file__).parents[2] / "configs" / "model"

ODD_HYBRID = ModelConfig(
    num_layers=5,
    pattern="M-*MT",
    hidden=48,
    ffn_hidden=80,
    num_heads=6,
    num_kv_heads=3,
    head_dim=10,
    vocab_size=56,
    rope_base=0.0,
    mamba_num_heads=12,
    mamba_head_dim=5,
    mamba_num_groups=3,
    mamba_state=7,
    mamba_chunk=8,
)
"""Nothing equals anything else, so a term with the wrong size cannot hide."""

FEATURES = replace(ODD_HYBRID, qkv_bias=True, qk_norm=QkNorm.full, post_norm=True, sliding_window=9)
"""What an attention may have beside its projections."""


def load(name: str) -> ModelConfig:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "activation" in values:
        values["activation"] = Activation[values["activation"]]
    return ModelConfig(**values)


def make_decoder(config: ModelConfig, device: str, dtype: torch.dtype = torch.float32) -> Decoder:
    return Decoder(config, lab(device=device, dtype=dtype), whole_model(config))


def first_of(config: ModelConfig, tp_size: int) -> Decoder:
    """The first tensor-parallel rank's part, on the meta device."""
    tp = Group("tp", tuple(range(tp_size)), 0, object())  # type: ignore[arg-type]
    mesh = replace(ParallelMesh.single_process(), tp=tp, tp_cp=tp)
    context = LayerContext.of(mesh, EmulatedBackend(), StepClock(0), torch.bfloat16, torch.device("meta"))
    return Decoder(config, context, whole_model(config))


def logical_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    return {r.name: r.global_shape for p in model.parameters() for r in p.placement.rectangles}


@pytest.mark.parametrize(
    ("name", "billions"),
    [("nemotron_h_12b", 12.310), ("nemotron_h_8b", 8.10), ("gpt_1_2b", 1.292)],
)
def test_known_totals_and_the_real_model(name: str, billions: float) -> None:
    """The arithmetic, the modules and the published totals agree, tensor by tensor."""
    config = load(name)
    parameters = model_parameters(config)
    assert sum(p.numel for p in parameters) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert {p.name: p.shape for p in parameters} == logical_shapes(make_decoder(config, "meta"))


@pytest.mark.parametrize("kind", [QkNorm.head, QkNorm.full])
def test_biases_and_norms_of_an_attention(kind: QkNorm) -> None:
    config = replace(FEATURES, qk_norm=kind)
    assert {p.name: p.shape for p in model_parameters(config)} == logical_shapes(make_decoder(config, "meta"))
    config = replace(config, ffn_hidden=81)
    assert sum(by_kind(model_parameters(config), tp=3).values()) == sum(
        p.numel() for p in first_of(config, 3).parameters()
    )


def test_a_window_costs_the_keys_that_are_seen() -> None:
    seen = sum(min(position + 1, 9) for position in range(21)) / 21
    whole, window = (count_flops(config, 21).attention for config in (ODD_HYBRID, FEATURES))
    assert window / whole == pytest.approx(seen / 11)
    assert count_flops(FEATURES, 8).attention == count_flops(ODD_HYBRID, 8).attention


def test_exact_total_of_the_12b() -> None:
    """Projections, embedding and head exactly as derived from the paper; the total is theirs plus the small tensors."""
    counts = by_kind(model_parameters(load("nemotron_h_12b")))
    assert counts["mamba"] == 28 * 168_427_520
    assert counts["mlp"] == 28 * 209_715_200
    assert counts["attention"] == 6 * 62_914_560
    assert counts["embedding"] == counts["head"] == 131072 * 5120
    assert sum(counts.values()) == 12_310_001_152


def test_the_papers_variants() -> None:
    """Head dim 64 of the 12B and 4 key-value heads of the 8B are options that change what they must, and only that."""
    twelve = load("nemotron_h_12b")
    paper = replace(twelve, mamba_num_heads=160, mamba_head_dim=64)
    assert paper.mamba_inner == twelve.mamba_inner == 10240
    eight = replace(load("nemotron_h_8b"), num_kv_heads=4)
    assert sum(p.numel for p in model_parameters(eight)) / 1e9 == pytest.approx(8.08, abs=0.005)


def test_small_configs_are_what_their_comments_say() -> None:
    blocks = {}
    for name in ("gpt_50m", "hybrid_50m"):
        config = replace(load(name), vocab_size=16384)
        blocks[name] = sum(p.numel for p in model_parameters(config) if p.block is not None) / 1e6
        assert 30 < sum(p.numel for p in model_parameters(config)) / 1e6 < 60
    assert blocks["gpt_50m"] == pytest.approx(28.3, abs=0.05)
    assert blocks["hybrid_50m"] == pytest.approx(29.0, abs=0.05)
    for name in ("hybrid_tiny", "hybrid_50m"):
        assert load(name).pattern.startswith("M-")
        assert load(name).pattern.endswith("M-M-M-M-")  # the paper's BF16 blocks mean the same here


@pytest.mark.parametrize("tied", [False, True])
def test_stages_cover_the_model(tied: bool) -> None:
    """A parameter lost or counted twice by the split; the tied table is on both ends."""
    config = replace(ODD_HYBRID, tied_embeddings=tied)
    names = [p.name for stage in split_stages(config, 3) for p in stage_parameters(config, stage)]
    extra = ["embedding.weight"] if tied else []
    assert sorted(names) == sorted([p.name for p in model_parameters(config)] + extra)


def test_local_sizes() -> None:
    """Sharded over tp except norms; the first rank has the remainder of the vocabulary."""
    config = replace(ODD_HYBRID, vocab_size=57)
    whole, half = (by_kind(model_parameters(config), tp) for tp in (1, 2))
    assert half["embedding"] == 29 * 48
    assert half["attention"] * 2 == whole["attention"]
    mamba_norms = 2 * config.mamba_inner
    assert half["norms"] == whole["norms"] - mamba_norms // 2


@pytest.mark.parametrize("name", ["nemotron_h_12b", "gpt_1_2b"])
def test_local_sizes_are_those_of_the_modules(name: str) -> None:
    """The first of eight tensor-parallel ranks, on the meta device; an uneven vocabulary gives it the remainder."""
    config = replace(load(name), vocab_size=131073)
    model = first_of(config, 8)
    assert sum(by_kind(model_parameters(config), tp=8).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("seq_length", [16, 21])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_equal_torchs_counter(seq_length: int, tied: bool) -> None:
    """Exactly, forward and training. Attention in its unfused form: torch has no count for the fused CPU kernel."""
    config = replace(ODD_HYBRID, tied_embeddings=tied)
    model = make_decoder(config, "cpu")
    initialize_parameters(model, 0)
    tokens = torch.arange(2 * seq_length).view(2, seq_length)
    positions = torch.arange(seq_length).expand(2, -1)
    args = (tokens % config.vocab_size, tokens, positions, torch.zeros_like(tokens))
    flops = count_flops(config, seq_length, causal=False)
    assert set(flops.linears) == set(linears_of(model))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*args)
    assert counter.get_total_flops() == pytest.approx(flops.forward * 2 * seq_length, rel=1e-12)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*args).sum().backward()
    executed = flops.training + flops.scan  # Mamba computes its scan again in the backward pass (layers/mamba/mixer.py)
    assert counter.get_total_flops() == pytest.approx(executed * 2 * seq_length, rel=1e-12)


def test_causal_counts_half() -> None:
    full, causal = (count_flops(ODD_HYBRID, 100, causal=causal).attention for causal in (False, True))
    assert causal == pytest.approx(full * 101 / 200)


def test_share_of_the_12b_in_nvfp4() -> None:
    """The paper's plan: first 2 and last 8 blocks and the head in BF16 leave 9.07 B of 12.31 B parameters in FP4."""
    config = load("nemotron_h_12b")
    flops = count_flops(config, 8192)
    chosen = {name for name in flops.linears if name != "head" and 2 <= int(name.split(".")[1]) < 54}
    assert len(flops.linears) - 1 - len(chosen) == 20
    assert quantized_parameters(config, chosen) / 1e9 == pytest.approx(9.07, abs=0.005)
    gemms = {name: (name in chosen,) * 3 for name in flops.linears}
    share = flops.quantized_share(gemms)
    assert 0.70 < share < 0.80
    forward_high = {name: (False, on, on) for name, (on, _, _) in gemms.items()}
    assert flops.quantized_share(forward_high) == pytest.approx(share * 2 / 3)
