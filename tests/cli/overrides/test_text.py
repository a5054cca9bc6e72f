"""Where the schema says string, the characters count that the user wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp4.cli.compose import ConfigError, compose_config, load_run_config, to_run_config, to_yaml
from megatron_fp4.cli.overrides.text import ambiguous_text, as_meant
from megatron_fp4.train.config import RunConfig

NOT_TEXT_TO_HYDRA = ["20251129_01", "1e3", "1.50", "+7", "0.1", "True", "inf", "NaN", "1_000", "-3"]


def composed(*overrides: str) -> RunConfig:
    return to_run_config(compose_config(["model.vocab_size=96", *overrides]))


@pytest.mark.parametrize("written", NOT_TEXT_TO_HYDRA)
def test_a_directory_is_called_as_it_was_written(written: str) -> None:
    assert composed(f"train.run_dir={written}").train.run_dir == written


def test_text_inside_lists_and_dictionaries() -> None:
    config = composed("data.sources=[{name: 1e3, paths: [20_1, 2.50, a]}]", "train.resume_allow=[1e3, 007]")
    assert (config.data.sources[0].name, config.data.sources[0].paths) == ("1e3", ["20_1", "2.50", "a"])
    assert config.train.resume_allow == ["1e3", "007"]


def test_sizes_of_stages_need_no_quotes() -> None:
    """Hydra takes a comma for a sweep over several runs."""
    assert composed("parallel.stage_split=9,8,8,7").parallel.stage_split == "9,8,8,7"


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1e-3", "model=gpt_tiny", "train.run_dir='1e3'", "train.run_dir=${x}", "train.run_dir=null", "a", "x=["],
)
def test_everything_else_stays(override: str) -> None:
    assert as_meant(override) == override


def test_the_name_of_an_option_is_text() -> None:
    with pytest.raises(ConfigError, match="experiment=2025_1 does not exist"):
        compose_config(["experiment=2025_1"])


@settings(max_examples=60, deadline=None)
@given(st.from_regex(r"[a-zA-Z0-9_.+-]{1,12}", fullmatch=True).filter(lambda text: text.lower() != "null"))
def test_any_word_is_its_own_text(written: str) -> None:
    quoted = as_meant(f"train.run_dir={written}").partition("=")[2]
    assert quoted.strip("'") == written
    assert as_meant(f"train.run_dir={quoted}") == f"train.run_dir={quoted}"


def test_a_stored_configuration_keeps_text(tmp_path: Path) -> None:
    tree = compose_config(["model.vocab_size=96", "data.sources=[{name: 1e3, paths: [1_0, 0x1, off]}]"])
    (tmp_path / "config.yaml").write_text(to_yaml(tree))
    assert load_run_config(tmp_path).data.sources == to_run_config(tree).data.sources


# -- YAML files --------------------------------------------------------------------------------------------------------


def config_dir(folder: Path, experiment: str) -> Path:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{experiment}\n")
    return folder


@pytest.mark.parametrize(
    ("written", "line", "reads"),
    [
        ("train:\n  run_dir: 20251129_01", 3, "2025112901"),
        ("train: {run_dir: 1e3}", 2, "1000.0"),
        ("train: {run_dir: true}", 2, "True"),
        ("data:\n  sources:\n    - name: a\n      paths: [a, 1.50]", 5, "1.5"),
        ("precision:\n  rules:\n    - {use: 0x10}", 4, "16"),
    ],
)
def test_a_yaml_file_is_refused_with_the_line(tmp_path: Path, written: str, line: int, reads: str) -> None:
    directory = config_dir(tmp_path, written)
    with pytest.raises(
        ConfigError, match=rf"mine.yaml, line {line}: .* YAML reads it as {reads}; write '.*' in quotes"
    ):
        compose_config(["experiment=mine"], [directory])
    compose_config([], [directory])  # nobody asked for that file


@pytest.mark.parametrize(
    "written",
    ["train: {run_dir: '1e3'}", "train: {run_dir: 7}", "train: {run_dir: ${oc.env:HOME}}", "optim: {lr: 1e-3}", "x: ["],
)
def test_yaml_that_loses_nothing_is_taken(tmp_path: Path, written: str) -> None:
    directory = config_dir(tmp_path, written)
    assert ambiguous_text(directory / "experiment/mine.yaml", group="experiment") == ""


@pytest.mark.parametrize("written", ["x: [", "train: {run_dir: a, run_dir: b}", "optim:\n\tlr: 1"])
def test_what_is_no_yaml_is_one_sentence_with_the_line(tmp_path: Path, written: str) -> None:
    with pytest.raises(ConfigError, match=r"mine.yaml\", line \d"):
        compose_config(["experiment=mine"], [config_dir(tmp_path, written)])
    stored = tmp_path / "config.yaml"
    stored.write_text(f"{written}\n")
    with pytest.raises(ConfigError, match=r"config.yaml.*line \d"):
        load_run_config(tmp_path)


def test_a_stored_configuration_that_was_edited(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: {tokenizer: 1e3}\n")
    with pytest.raises(ConfigError, match="line 1: 1e3 is text here"):
        load_run_config(tmp_path)
