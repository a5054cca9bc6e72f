"""Every YAML option of every group composes, passes the classes' checks, and means what the paper says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_fp4.cli.compose import CONFIG_DIR, ConfigError, compose_config, load_run_config, to_run_config, to_yaml
from megatron_fp4.models.block import model_linears
from megatron_fp4.optim.lr import decay_tokens
from megatron_fp4.precision.plan import PrecisionPlan
from megatron_fp4.precision.table import difference
from megatron_fp4.train.config import RunConfig

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
GROUPS = ("precision", "precision/recipe", "precision/rules")
OPTIONS = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIG_DIR / group).glob("*.yaml"))]
PLANS = json.loads((Path(__file__).parents[1] / "golden/precision_plans.json").read_text())


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


@pytest.mark.parametrize("option", OPTIONS)
def test_every_precision_option_composes(option: str) -> None:
    recipe = ["precision/recipe=nemotron3"] if option.startswith("precision/rules=nemotron3") else []
    model = "nemotron3_super" if option.startswith("precision/rules=nemotron3_") else "nemotron_h_8b"
    table = plan_of(load(option, f"model={model}", "model.vocab_size=131072", *recipe)).table()
    assert (table.num_quantized_gemms == 0) == option.endswith("=bf16")


def described(plan: PrecisionPlan) -> dict[str, dict[str, str]]:
    """By the tokens at which a phase starts: precision in words -> names of the linears."""
    phases: dict[str, dict[str, str]] = {}
    for start, table in plan.phases:
        names: dict[str, list[str]] = {}
        for line in difference({}, table.texts()):
            name, _, text = line.partition(": absent -> ")
            names.setdefault(text, []).append(name)
        phases[f"from {start} tokens"] = {text: " ".join(sorted(group)) for text, group in names.items()}
    return phases


@pytest.mark.parametrize("selection", PLANS)
def test_a_selection_means_what_it_always_meant(selection: str) -> None:
    """A change here is a change of the numbers of that experiment."""
    config = load(*selection.split(), "model.vocab_size=131072")
    values = config.precision
    assert PLANS[selection] == {
        "settings": f"backend {values.backend.name}, compute_dtype {values.compute_dtype.name},"
        f" compile {values.compile}, evaluation {values.evaluation}",
        **described(plan_of(config)),
    }


def test_every_experiment_has_its_plan_recorded() -> None:
    assert {f"experiment={name}" for name in EXPERIMENTS} <= set(PLANS)


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
    printed = str(caught.value)
    assert printed.startswith(str(tmp_path / "config.yaml"))
    for gemm in ("dgrad", "wgrad"):
        old = f"precision.recipes.nvfp4.{gemm}.a"
        assert f"{old} is now called precision.recipes.nvfp4.{gemm}.dy" in printed


def test_an_old_name_in_an_experiment_of_ones_own(tmp_path: Path) -> None:
    directory = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, directory)
    (directory / "experiment/mine.yaml").write_text(
        "# @package _global_\nprecision: {recipes: {nvfp4: {wgrad: {b: {rht_size: 4}}}}}\n"
    )
    with pytest.raises(ConfigError, match=r"wgrad\.b is now called precision\.recipes\.nvfp4\.wgrad\.x"):
        compose_config(["experiment=mine"], [directory])


@pytest.mark.parametrize(
    ("options", "use", "last"),
    [
        (["precision/recipe=mxfp4"], "mxfp4", 8),
        (["precision=bf16"], "bf16", 8),
        (["precision=mxfp4"], "mxfp4", 8),
        (["precision=fp8_paper"], "fp8", 2),
        (["precision=fp8_paper", "precision/rules=paper_1_2b"], "fp8", 4),
        (["precision.keep_bf16.last=5"], "nvfp4", 5),
    ],
)
def test_recipe_and_rules_of_an_experiment_change_apart(options: list[str], use: str, last: int) -> None:
    """And what is typed wins: an experiment that chooses a recipe of its own must not undo precision=bf16."""
    precision = load("experiment=ablation_12b_no_rht", *options).precision
    assert (precision.use, precision.keep_bf16.last) == (use, last)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("bf16", "an experiment overrides /precision/recipe and /precision/rules"),
        ("nvfp4_paper", r"mine\.yaml: precision=nvfp4_paper is now called precision/rules=paper_12b$"),
    ],
)
def test_an_experiment_of_ones_own_that_chooses_precision_as_before(tmp_path: Path, option: str, message: str) -> None:
    directory = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, directory)
    experiment = directory / "experiment/mine.yaml"
    experiment.write_text(f"# @package _global_\ndefaults: [override /precision: {option}]\n")
    with pytest.raises(ConfigError, match=message):
        compose_config(["experiment=mine"], [directory])
