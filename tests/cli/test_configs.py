"""Every YAML option of every group composes, passes the classes' checks, and means what the paper says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_fp4.cli.compose import CONFIG_DIR, ConfigError, compose_config, load_run_config, to_run_config, to_yaml
from megatron_fp4.models.block import model_linears
from megatron_fp4.optim.lr import decay_tokens
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.train.config import RunConfig

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
PRECISIONS = sorted(path.stem for path in (CONFIG_DIR / "precision").glob("*.yaml"))


def load(*overrides: str) -> RunConfig:
    return to_run_config(compose_config(overrides))


def plan_of(config: RunConfig) -> PrecisionPlan:
    total = int(config.train.total_tokens)
    decay_start = total - decay_tokens(config.optim, total)
    return PrecisionPlan(config.precision, model_linears(config.model), total_tokens=total, decay_start=decay_start)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_its_precision_takes_effect(experiment: str) -> None:
    config = load(f"experiment={experiment}", "model.vocab_size=131072")
    table = plan_of(config).table()
    assert bool(config.precision.recipes) == (table.num_quantized_gemms > 0)
    assert len(Path(config.train.run_dir).parts) > 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_option_composes(precision: str) -> None:
    model = "nemotron_h_8b" if precision == "nemotron3" else "gpt_50m"
    plan_of(load(f"precision={precision}", f"model={model}", "model.vocab_size=131072"))


def test_the_12b_run_is_the_papers() -> None:
    config = load("experiment=paper_12b_10t", "model.vocab_size=131072")
    assert config.tokens_per_step == 6_029_312
    assert config.total_steps == 1_658_564
    assert (config.optim.lr, config.optim.min_lr, config.optim.decay_fraction) == (4.5e-4, 4.5e-6, 0.2)
    assert [phase.tokens for phase in config.data.phases] == [7_000_000_000_000, 2_000_000_000_000, 0]
    formats = plan_of(config).table().formats()
    in_blocks = {name: row for name, row in formats.items() if name != "head"}
    high = [name for name, row in in_blocks.items() if row == ("bf16", "bf16", "bf16")]
    assert (len(in_blocks), len(high)) == (124, 20), "20 of 124 linears, 16%, stay in BF16 (section 3)"
    assert formats["head"] == ("bf16", "bf16", "bf16")


def test_only_the_forward_pass_switches_at_8_2t() -> None:
    plan = plan_of(load("experiment=ablation_12b_bf16_fprop_at_8_2t", "model.vocab_size=131072"))
    assert plan.phase_at(8_200_000_000_000 - 1) == 0
    assert plan.phase_at(8_200_000_000_000) == 1
    assert plan.table(0).formats()["blocks.20.mamba.in_proj"] == ("nvfp4", "nvfp4", "nvfp4")
    assert plan.table(1).formats()["blocks.20.mamba.in_proj"] == ("bf16", "nvfp4", "nvfp4")


def test_overrides_win_over_an_experiment() -> None:
    config = load("experiment=quickstart", "model.num_layers=4", "precision=bf16", "optim.lr=3e-4")
    assert (config.model.num_layers, config.optim.lr, config.precision.recipes) == (4, 3e-4, {})


def test_the_stored_configuration_of_an_old_run_is_refused_with_the_new_names(tmp_path: Path) -> None:
    stored = to_yaml(compose_config(["train.run_dir=x"])).replace("        dy:\n", "        a:\n")
    (tmp_path / "config.yaml").write_text(stored)
    with pytest.raises(ConfigError) as caught:
        load_run_config(tmp_path)
    said = str(caught.value)
    assert said.startswith(str(tmp_path / "config.yaml"))
    for gemm in ("dgrad", "wgrad"):
        old = f"precision.recipes.nvfp4.{gemm}.a"
        assert f"{old} is now called precision.recipes.nvfp4.{gemm}.dy" in said


def test_an_old_name_in_an_experiment_of_ones_own(tmp_path: Path) -> None:
    directory = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, directory)
    (directory / "experiment/mine.yaml").write_text(
        "# @package _global_\nprecision: {recipes: {nvfp4: {wgrad: {b: {rht_size: 4}}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"wgrad\.b is now called precision\.recipes\.nvfp4\.wgrad\.x"):
        compose_config(["experiment=mine"], directory)
