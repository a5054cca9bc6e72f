"""One YAML of one's own, compared in five formats: `precision=NAME` changes the format and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from megatron_fp4.cli.compose import CONFIG_DIR, ConfigError, compose_config, to_run_config
from megatron_fp4.precision.config import HIGH
from megatron_fp4.train.checked import CheckedConfig, check_config

FORMATS = {"bf16": "bf16", "fp8": "fp8_block", "mxfp8": "mxfp8", "mxfp4": "mxfp4", "nvfp4": "nvfp4"}
"""precision=NAME -> the format in which it computes what is quantized."""
LAYOUT = {"paper_12b_10t": 32, "quickstart": 1, "mine": 1}
MINE = """# @package _global_
model: {vocab_size: 8192, hidden: 256, ffn_hidden: 512, num_heads: 2, num_kv_heads: 1, head_dim: 128}
precision:
  use: nvfp4
  keep_bf16: {first: 1, last: 1}
  rules:
    - {match: "*.mlp.*", use: same, wgrad: bf16}
    - {match: "*.attention.out", use: bf16}
  recipes: {nvfp4: {wgrad: {dy: {rht_size: 4}, x: {rht_size: 4}}}}
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    (directory / "experiment").mkdir()
    (directory / "experiment/mine.yaml").write_text(MINE)
    return directory


def checked(configs: Path, *overrides: str, world_size: int = 1) -> CheckedConfig:
    return check_config(to_run_config(compose_config(overrides, [configs])), world_size)


@pytest.mark.parametrize("experiment", LAYOUT)
def test_only_the_format_differs(configs: Path, experiment: str) -> None:
    """The same linears and GEMMs are quantized, by the same rules; precision=bf16 quantizes none of them."""
    overrides = (f"experiment={experiment}", "model.vocab_size=131072", "data.tokenizer=''", "parallel.tp=1")
    tables = {}
    for name, form in FORMATS.items():
        table = checked(configs, *overrides, f"precision={name}").plan.table()
        reasons = {row.name: row.reason.replace(f"use: {name}", "use") for row in table.rows}
        formats = table.formats()
        assert {word for row in formats.values() for word in row} == {HIGH, form}
        tables[name] = {key: ([word != HIGH for word in formats[key]], reasons[key]) for key in formats}
    quantized = {key: row for key, (row, _) in tables["nvfp4"].items() if any(row)}
    assert quantized, "the comparison is of something"
    assert not any(any(row) for row, _ in tables.pop("bf16").values())
    for name, table in tables.items():
        assert table == tables["nvfp4"], f"precision={name} quantizes something else, or by another rule"


def test_rules_of_an_experiment_that_name_a_format_say_how_not_to(configs: Path) -> None:
    named = MINE.replace("use: same", "use: nvfp4").partition("  recipes:")[0]
    (configs / "experiment/named.yaml").write_text(named)
    with pytest.raises(ValueError, match=r"'nvfp4' does not exist; known: bf16, fp8\. .*`use: same` follows it"):
        checked(configs, "experiment=named", "precision=fp8")
    checked(configs, "experiment=named", "precision=bf16")


def test_what_is_typed_for_another_recipe_is_still_refused(configs: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"precision\.recipes\.nvfp4: .*nothing is quantized, so rht_size would have no effect"
    ):
        checked(configs, "experiment=mine", "precision=bf16", "precision.recipes.nvfp4.wgrad.x.rht_size=4")


def test_same_needs_a_recipe_to_be_the_same_as(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"`same` is the recipe of precision\.use, which is not set"):
        checked(configs, "experiment=mine", "precision.use=''", "precision.keep_bf16={first: 0, last: 0}")


@pytest.mark.parametrize("precision", ["fp8", "mxfp8", "mxfp4"])
def test_where_tiles_do_not_fit_the_overrides_that_pad_are_printed(configs: Path, precision: str) -> None:
    """And typed as they are printed, they are all that is missing."""
    small = ("experiment=quickstart", "model.vocab_size=8192", "data.tokenizer=''", f"precision={precision}")
    small += ("data.seq_length=20", "train.micro_batch=1", "data.sources=[]", "model.ffn_hidden=688")
    with pytest.raises(ValueError, match="pad with zeros") as caught:
        checked(configs, *small, world_size=2)
    padding = re.findall(rf"precision\.recipes\.{precision}\.\w+\.pad=true", str(caught.value))
    assert padding
    assert checked(configs, *small, *padding, world_size=2).plan.table().num_quantized_gemms == 60


def test_an_experiment_that_is_no_ablation_lists_no_layers() -> None:
    """They stand once, in configs/precision/rules; an ablation that keeps other blocks is one line."""
    for path in (CONFIG_DIR / "experiment").glob("*.yaml"):
        precision = (yaml.safe_load(path.read_text()) or {}).get("precision") or {}
        listed = precision.keys() & {"keep_bf16", "rules", "recipes"}
        assert not listed or (path.stem.startswith("ablation_") and listed == {"keep_bf16"}), path.name
    for path in (CONFIG_DIR / "precision").glob("*.yaml"):
        body = yaml.safe_load(path.read_text())["precision"]
        assert not body.get("keep_bf16"), path.name
        assert not body.get("rules"), path.name
