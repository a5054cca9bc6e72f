"""What a user of hydra types means what it means elsewhere, in every command; what is wrong is one sentence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_fp4.cli import main, pretrain
from megatron_fp4.cli.compose import ConfigError, compose_config, load_run_config
from megatron_fp4.train.sections import WandbMode

COMMANDS = (
    "pretrain", "plan", "rehearse", "verify-parallel", "verify-resume", "preflight", "selftest", "crosscheck",
)  # fmt: skip
SMALL = ["model.vocab_size=96", "data.tokenizer=''"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder laid out like configs/, with an experiment that uses a model of its own."""
    folder = tmp_path / "own yaml"
    for name, text in {
        "experiment/mine.yaml": "# @package _global_\ndefaults: [override /model: big]\noptim: {lr: 0.5}\n",
        "model/big.yaml": "num_layers: 7\nvocab_size: 96\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert pretrain.main([*arguments, "--cfg"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1, printed
    return printed


# -- where files are looked for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["--config-dir {}", "--config-dir={}", "hydra.searchpath=['{}']"])
def test_a_folder_of_ones_own_is_added(own: Path, spelling: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.format(own) for word in spelling.split()]
    assert pretrain.main([*words, "experiment=mine", "train.seed=7", "--cfg"]) == 0
    printed = capsys.readouterr().out
    assert "num_layers: 7" in printed
    assert "lr: 0.5" in printed
    assert pretrain.main([*words, "experiment=quickstart", "--cfg"]) == 0, "those of configs/ are still there"


class SeenError(ValueError):
    """The command has composed its configuration, with the user's own experiment."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_folder(command: str, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(main.COMMANDS[command][0])
    composed: list[float] = []

    def seen(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> Any:
        composed.append(compose_config(overrides, config_dirs).optim.lr)
        raise SeenError("seen")

    monkeypatch.setattr(module, "compose_config", seen)
    assert main.run([command, "train.seed=3", f"--config-dir={own}", "experiment=mine"]) == 2
    assert main.run([command, "--config-dir", str(own), "train.seed=3", "experiment=mine"]) == 2
    assert composed == [0.5, 0.5]


def test_a_file_that_would_not_be_read(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra takes the first of a name, and configs/ comes first."""
    (own / "model/gpt_tiny.yaml").write_text("num_layers: 9\n")
    printed = refusal(capsys, f"--config-dir={own}", *SMALL)
    assert f"{own}/model/gpt_tiny.yaml is not read, because" in printed
    assert pretrain.main([f"--config-dir={own}", "experiment=mine", "--cfg"]) == 0, "nobody asked for it"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config-dir=nowhere"], "--config-dir nowhere: there is no such folder"),
        (["hydra.searchpath=[nowhere]"], "hydra.searchpath nowhere: there is no such folder"),
        (["hydra.searchpath=[pkg://no.such]"], "hydra.searchpath pkg://no.such: there is no such package"),
        (["hydra.searchpath=nowhere"], "a list of folders is expected"),
        (["--config-dir"], "--config-dir: expected one argument"),
    ],
)
def test_places_that_do_not_exist(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["experiment=mine", "--cfg", *arguments]) == 2
    assert expected in capsys.readouterr().err


# -- files by their path -----------------------------------------------------------------------------------------------


def test_an_experiment_by_its_path(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "experiment/größe's.yaml").write_text("# @package _global_\noptim: {lr: 0.25}\n")
    alone = own.parent / "alone.yaml"
    alone.write_text("# @package _global_\noptim: {lr: 0.125}\n")
    monkeypatch.chdir(own.parent)
    for written, lr in {
        str(alone): 0.125,
        "alone.yaml": 0.125,
        "'own yaml/../alone.yaml'": 0.125,
        f'"{own}/experiment/größe\'s.yaml"': 0.25,
        "quickstart.yaml": 3e-3,
    }.items():
        assert compose_config([f"experiment={written}", *SMALL]).optim.lr == lr, written
    assert compose_config([f"model='{own}/model/big.yaml'"]).model.num_layers == 7, "any group"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lr: 1.0e-3}\n", "begins with `# @package _global_`"),
        ("# @package _global_\noptim: {lr: [\n", 'mine.yaml", line 3, column 1: expected the node content'),
        ("# @package _global_\nmodle: {num_layers: 3}\n", "unknown key 'modle'; did you mean 'model'?"),
        ("# @package _global_\nmodel: {hidden_size: 8}\n", "hidden_size is called model.hidden here"),
        ("# @package _global_\ntrain: {global_batch: 1e3}\n", "full_key: train.global_batch; write 1000"),
        ("# @package _global_\nlogging: {wandb: off}\n", "YAML reads off and no as False"),
        ("# @package _global_\n- optim\n", "sections and settings are expected"),
        ("# @package _global_\ndefaults: {model: gpt_tiny}\n", "defaults must be a list"),
        ("# @package _global_\ndefaults: [override /model: gpt_tinny]\n", "did you mean 'gpt_tiny'"),
        ("# @package _global_\nx: \xff\n", "utf-8"),
        ("# @package _global_\ntrain: {run_dir: '${unclosed'}\n", "an interpolation looks like ${optim.lr}"),
        ("# @package _global_\ndata: {sources: &x [*x]}\n", "an anchor (&name) holds itself"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="latin-1")
    printed = refusal(capsys, f"experiment={file}", *SMALL)
    assert expected in printed
    assert str(file) in printed or "gpt_tinny" in printed
    assert "../" not in printed


@pytest.mark.parametrize(
    ("text", "expected"), [("norm_eps: ${unclosed\n", "an interpolation looks"), ("hidden: &x [*x]\n", "holds itself")]
)
def test_mistakes_in_a_file_of_any_group(
    tmp_path: Path, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(text)
    printed = refusal(capsys, "model=mine", f"--config-dir={tmp_path}")
    assert printed.startswith(f"error: {file}: ")
    assert expected in printed
    (tmp_path / "config.yaml").write_text(f"model:\n  {text}")
    with pytest.raises(ConfigError, match=rf"config\.yaml: .*{expected}"):
        load_run_config(tmp_path)


def test_a_path_without_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert f"there is no such file in {Path.cwd()}" in refusal(capsys, "experiment=runs/no.yaml")
    (tmp_path / "a.yml").write_text("")
    assert "files that end in .yaml" in refusal(capsys, f"experiment={tmp_path}/a.yml")


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("none", ["experiment=null", "~experiment", "experiment=NULL"])
def test_no_experiment(none: str) -> None:
    assert compose_config([*SMALL, none]) == compose_config(SMALL)


@pytest.mark.parametrize("flags", [["--cfg"], ["--cfg", "job"], ["-c", "job"], ["-c"]])
@pytest.mark.parametrize("last", [False, True])
def test_cfg_as_here_and_as_elsewhere(flags: list[str], last: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, *flags] if last else [*flags, *SMALL]
    assert pretrain.main(arguments) == 0
    assert "vocab_size: 96" in capsys.readouterr().out


def test_cfg_of_hydra_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--cfg", "hydra"]) == 2
    assert "--cfg job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.global_batch=1e3", lambda config: config.train.global_batch == 1000),
        ("data.skip=[[1e2,2.5e2]]", lambda config: config.data.skip == [[100, 250]]),
        ("optim.warmup_tokens=1.5e12", lambda config: config.optim.warmup_tokens == 1_500_000_000_000),
        ("optim.warmup_tokens=12345678901234567e1", lambda config: config.optim.warmup_tokens == 123456789012345670),
        ("logging.wandb=true", lambda config: config.logging.wandb == WandbMode.auto),
        ("logging.wandb=on", lambda config: config.logging.wandb == WandbMode.auto),
        ("logging.wandb=False", lambda config: config.logging.wandb == WandbMode.disabled),
        ("logging.wandb=off", lambda config: config.logging.wandb == WandbMode.disabled),
        ("optim.overlap_gather=false", lambda config: config.optim.overlap_gather.name == "never"),
        ("parallel.overlap_tensor=true", lambda config: config.parallel.overlap_tensor.name == "always"),
        ("train.resume=no", lambda config: config.train.resume.name == "never"),
        ("train.run_dir='runs/a b~=ß'", lambda config: config.train.run_dir == "runs/a b~=ß"),
    ],
)
def test_a_value_is_what_its_setting_can_be(override: str, value: Callable[[Any], bool]) -> None:
    assert value(compose_config([*SMALL, override])), override


@pytest.mark.parametrize("override", ["train.global_batch=1.5", "train.global_batch=inf", "train.recompute=true"])
def test_what_is_no_such_value_stays_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"could not be converted to Integer|expected one of"):
        compose_config([*SMALL, override])


@pytest.mark.parametrize(
    ("override", "typed"),
    [
        ("train.run_dir=a=b", "\"train.run_dir='a=b'\""),
        ("train.run_dir=größe", "\"train.run_dir='größe'\""),
        ("train.run_dir=a(b", "\"train.run_dir='a(b'\""),
        ("data.tokenizer=x y=z", "\"data.tokenizer='x y=z'\""),
        ("train.run_dir=$a(", "'train.run_dir='\"'\"'$a('\"'\"''"),
        ("train.run_dir=~/runs", '"train.run_dir=$HOME/runs"'),
    ],
)
def test_the_quoted_form_is_in_the_message(override: str, typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"type {typed}\n" in refusal(capsys, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("hydra.run.dir=x", "hydra.run.dir has no effect"),
        ("hydra/launcher=basic", "pretrain --multirun"),
        ("hydra.sweep.dir=x", "pretrain --multirun"),
        ("hydra.verbose=true", "hydra.verbose has no effect"),
        ("optim.lr=1e-3,3e-3", "pretrain --multirun runs each of several"),
        ("+foo=1", "unknown key 'foo'"),
        ("optim.lr", "type optim.lr=VALUE"),
        ("tensor_model_parallel_size=2", "is called parallel.tp here"),
        ("model.hidden_size=2", "is called model.hidden here"),
    ],
)
def test_what_has_no_effect_is_refused_by_name(
    override: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(capsys, override)
