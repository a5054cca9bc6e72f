"""The recipes of Nemotron 3 are what its reports say, counted here by other code than the product's."""

from __future__ import annotations

import functools

import pytest

from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.models.block import model_linears
from megatron_fp4.models.count import active_parameters, count_flops, model_parameters
from megatron_fp4.models.mtp.config import MtpConfig
from megatron_fp4.optim import learning_rate
from megatron_fp4.precision.table import PrecisionTable
from megatron_fp4.train.config import RunConfig
from tests.cli.test_configs import plan_of

SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA = "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
"""As NVIDIA's scripts have them (Megatron-LM, examples/post_training/modelopt/conf/nvidia)."""
LAST_IN_BF16 = {"nemotron3_super": 14, "nemotron3_ultra": 16, "nemotron3_tiny": 1}
LINEARS = {  # of a block by its letter -> format by Table 3 of the report
    "M": {"mamba.in_proj": "nvfp4", "mamba.out_proj": "mxfp8"},
    "*": {"attention.qkv": "bf16", "attention.out": "bf16"},
    "E": {
        "moe.latent.down": "bf16",
        "moe.experts.up": "nvfp4",
        "moe.experts.down": "nvfp4",
        "moe.latent.up": "bf16",
        "moe.shared.up": "nvfp4",
        "moe.shared.down": "nvfp4",
    },
}


@functools.cache
def load(name: str) -> RunConfig:
    vocabulary = ["model.vocab_size=8192"] if name == "nemotron3_tiny" else []
    return to_run_config(compose_config([f"experiment={name}", *vocabulary]))


@functools.cache
def table_of(name: str) -> PrecisionTable:
    return plan_of(load(name)).table()


def by_formula(
    d: int, ff: int, latent: int, shared: int, heads: int, q: int, blocks: tuple[int, int, int]
) -> tuple[float, float, float, float]:
    """Parameters: all, those that act, of multi-token prediction's shared block; FLOPs a token at 8192, with it.

    512 experts, 22 of which act, heads of 64 in Mamba-2 and of 128 in attention, 8 groups of state 128, 2 key and value
    heads, a vocabulary of 131,072; norms, convolutions and the scan are left out.
    """
    mamba, experts, attention = blocks
    expert, around, table = 2 * latent * ff, 2 * d * latent + 2 * d * shared + d * 512, 131072 * d
    inner = 64 * heads
    in_mamba = d * (2 * inner + 2 * 8 * 128 + heads) + inner * d
    in_attention = 2 * d * q * 128 + 2 * d * 2 * 128
    others = mamba * in_mamba + attention * in_attention + 2 * table
    total = experts * (512 * expert + around) + others
    active = experts * (22 * expert + around) + others
    block = in_attention + around + 2 * d * d
    scores = 6 * q * 128 * 8192
    flops = 6 * (active - table) + attention * scores + 2 * (6 * (22 * expert + block + table) + scores)
    return total, active, 512 * expert + block, flops


FORMULA = {
    "nemotron3_super": by_formula(4096, 2688, 1024, 5376, 128, 32, (40, 40, 8)),
    "nemotron3_ultra": by_formula(8192, 5120, 2048, 10240, 256, 64, (48, 48, 12)),
}
REPORTED = {  # billions: all, those that act, with multi-token prediction; GFLOP a token
    "nemotron3_super": (120.67, 12.77, 123.61, 84.8),
    "nemotron3_ultra": (549.3, 56.06, 560.5, 359.7),
}


@pytest.mark.parametrize("name", FORMULA)
def test_parameters_and_flops(name: str) -> None:
    total, active, prediction, flops = FORMULA[name]
    billions = total / 1e9, active / 1e9, (total + prediction) / 1e9, flops / 1e9
    assert billions == pytest.approx(REPORTED[name], rel=1e-3)
    model = load(name).model
    parameters = model_parameters(model)
    outside = sum(parameter.numel for parameter in parameters if parameter.name.startswith("mtp."))
    ours = sum(parameter.numel for parameter in parameters)
    assert ours - outside == pytest.approx(total, rel=1e-4)
    assert outside == pytest.approx(prediction, rel=1e-4)
    assert active_parameters(model.with_blocks(model.pattern, MtpConfig())) == pytest.approx(active, rel=1e-3)
    counted = count_flops(model, 8192)
    assert counted.training - 3 * counted.scan == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize("name", LAST_IN_BF16)
def test_precision_is_the_reports_table(name: str) -> None:
    """Every linear of every block; embeddings are no linears, and the router is FP32 whatever a table says."""
    config = load(name)
    pattern = {"nemotron3_super": SUPER, "nemotron3_ultra": ULTRA, "nemotron3_tiny": "MEM*EME"}[name]
    expected = {"head": "bf16"}
    for index, letter in enumerate(pattern):
        kept = index >= len(pattern) - LAST_IN_BF16[name]
        for linear, number_format in LINEARS[letter].items():
            expected[f"blocks.{index}.{linear}"] = "bf16" if kept else number_format
    expected |= {info.name: "bf16" for info in model_linears(config.model) if info.name.startswith("mtp.")}
    assert any(linear.startswith("mtp.0.") for linear in expected)
    assert config.model.pattern == pattern
    assert table_of(name).formats() == {linear: (one,) * 3 for linear, one in expected.items()}
    recipe = config.precision.recipes["nvfp4"]
    assert (recipe.fprop.w.tile, recipe.wgrad.x.rht_size, recipe.dgrad.dy.rounding.name) == ((16, 16), 16, "sr")


@pytest.mark.parametrize(
    ("name", "peak", "total", "last"),
    [("nemotron3_super", 4.5e-4, 25e12, 5e12), ("nemotron3_ultra", 2.5e-4, 20e12, 5e12)],
)
def test_schedule_and_phases(name: str, peak: float, total: float, last: float) -> None:
    config = load(name)
    assert config.tokens_per_step == 3072 * 8192 == 25_165_824
    tokens = config.run_tokens

    def rate(consumed: float) -> float:
        return learning_rate(config.optim, round(consumed), tokens)

    assert rate(100e9) == pytest.approx(peak / 2)
    assert rate(200e9) == rate(total - last - config.tokens_per_step) == peak
    middle = tokens - last / 4  # three quarters of the decay
    assert rate(middle) == pytest.approx(peak / 100 + (1 - 0.75**0.5) * peak * 0.99, rel=1e-4)
    assert rate(tokens) == peak / 100
    assert [phase.tokens for phase in config.data.phases] == [total - last, 0]
    assert config.train.save_interval_steps * config.tokens_per_step == pytest.approx(25e9, rel=0.01)
    merged = (config.checkpoint.keep_last - 1) * config.train.save_interval_steps * config.tokens_per_step
    assert merged == pytest.approx(500e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak", "tokens"), [("nemotron3_super_1m", 4.5e-6, 34e9), ("nemotron3_ultra_1m", 2.5e-6, 33e9)]
)
def test_the_long_context_phase_begins_where_the_run_has_ended(name: str, peak: float, tokens: float) -> None:
    config = load(name)
    before = load(name.removesuffix("_1m"))
    assert config.model == before.model
    assert config.precision == before.precision
    assert (config.data.seq_length, config.train.global_batch, config.train.total_tokens) == (2**20, 16, tokens)
    assert learning_rate(config.optim, config.run_tokens // 2, config.run_tokens) == peak == before.optim.min_lr
    assert config.train.init_from == before.train.run_dir
