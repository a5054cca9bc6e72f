"""A fuzz over all settings: every value is a configuration that passes all checks of a start, or one sentence."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.cli.schema import build, twin
from megatron_fp4.settings import Section, Setting, sections
from megatron_fp4.train.checked import check_config
from megatron_fp4.train.config import RunConfig
from megatron_fp4.train.opened import open_data
from tests.helpers.letters import make_tokenizer
from tests.helpers.tiny_run import tiny_run

PLACES = [(section, setting) for section in sections(RunConfig) for setting in section.settings]
KEYS = [f"{section.key}.{setting.name}" for section, setting in PLACES]
WRONG = [math.nan, math.inf, -1, 0, -0.5, 1e30, 2**70, "x", "", "[", "\0", [], {}, None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration with one element in every list, whose data can be opened."""
    folder = tmp_path_factory.mktemp("fuzz")
    run = tiny_run(folder)
    (folder / "quiz.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 1}\n')
    paths = next(item for item in run.overrides if item.startswith("data.sources")).split("'")[1]
    lists = [
        f"data.evaluation=[{{name: held, paths: ['{paths}'], may_overlap: true}}]",
        f"data.tokenizer='{make_tokenizer(folder)}'",
        f"data.tasks=[{{name: quiz, path: '{folder}/quiz.jsonl'}}]",
        "train.eval_interval_steps=1",
        "data.phases=[{name: all}]",
        "precision.rules=[{match: '*.mlp.up', use: bf16}]",
        "precision.switch=[{at_fraction: 0.5, use: bf16}]",
    ]
    tree = OmegaConf.to_container(compose_config([*run.overrides, "precision=nvfp4", *lists]))
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def with_value(whole: dict[str, Any], section: Section, name: str, value: Any) -> RunConfig:
    """The configuration with another value of a setting, which the schema has converted or refused."""
    node = OmegaConf.structured(twin(section.cls))
    OmegaConf.update(node, name, value)
    converted = OmegaConf.to_container(node)
    assert isinstance(converted, dict)
    tree = copy.deepcopy(whole)
    place: Any = tree
    for part in section.key.replace("[]", ".0").replace("NAME", "nvfp4").split("."):
        place = place[int(part) if part.isdecimal() else part]
    place[name] = converted[name]
    return build(RunConfig, tree)


@pytest.mark.parametrize(("section", "setting"), PLACES, ids=KEYS)
def test_no_value_of_a_setting_is_a_traceback(
    whole: dict[str, Any],
    section: Section,
    setting: Setting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each passes every check of a start, or is an error that the command tells with exit code 2."""
    monkeypatch.chdir(tmp_path)
    sentences = []
    for value in WRONG:
        try:
            config = with_value(whole, section, setting.name, value)
            open_data(check_config(config, 1), dp_rank=0)
        except (ValueError, FileNotFoundError, OmegaConfBaseException) as error:
            sentences.append(str(error))
    assert all(len(sentence.split()) > 3 for sentence in sentences), sentences


@pytest.mark.parametrize(("section", "setting"), PLACES[::12], ids=KEYS[::12])
def test_no_override_is_a_traceback(section: Section, setting: Setting) -> None:
    """The same through the command line, for some: what hydra's grammar makes of the text comes first."""
    key = f"{section.key}.{setting.name}".replace("NAME", "nvfp4").replace("[]", ".0")
    for text in ("nan", "["):
        with suppress(ConfigError):
            to_run_config(compose_config(["model.vocab_size=96", f"{key}={text}"]))
