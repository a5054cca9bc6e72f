"""`--help` of every command says the name as typed, what may be given, the exit codes, and one example."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_tools.arguments import EXAMPLES as TOOL_EXAMPLES
from data_tools.cli import TOOLS
from megatron_fp4.cli import main
from megatron_fp4.cli.checkpoint import EXAMPLES
from megatron_fp4.cli.compose import CONFIG_DIR
from megatron_fp4.cli.overrides.foreign import COUNTERPARTS, page
from megatron_fp4.cli.schema import hint_at

ROOT = Path(__file__).resolve().parents[2]
ACTIONS = re.compile(r"\{([\w,-]+)\}")


def help_of(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    try:
        code = main.run([*command, "--help"])
    except SystemExit as end:
        code = end.code or 0
    assert code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_says_how_it_is_used(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_page(help_of(capsys, command), command)


def check_page(text: str, command: str) -> None:
    assert text.startswith(f"usage: megatron-fp4 {command} ")
    assert re.search(r"exit codes:\n  0    \w", text)
    assert "\n  2    " in text
    example = text.partition("example:\n")[2].strip()
    assert example.startswith(f"megatron-fp4 {command}")
    assert "\n" not in example


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_called_as_it_is_typed(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_page(help_of(capsys, "data", tool), f"data {tool}")


@pytest.mark.parametrize("tool", TOOLS)
def test_the_example_of_a_tool_is_one_that_it_takes(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.run(["data", tool, *shlex.split(TOOL_EXAMPLES[tool]), "--frobnicate"])
    assert "unrecognized arguments: --frobnicate" in capsys.readouterr().err


@pytest.mark.parametrize("action", EXAMPLES)
def test_every_action_on_checkpoints_says_how_it_is_used(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_page(help_of(capsys, "checkpoint", action), f"checkpoint {action}")


@pytest.mark.parametrize("command", [name for name in main.COMMANDS if name not in ("env", "explain", "data")])
def test_an_example_is_one_that_the_command_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is not there, or a layout of several ranks, is all that can be refused of it."""
    example = shlex.split(help_of(capsys, command).partition("example:\n")[2])
    wrong = [*example[2:], "--frobnicate"]
    try:
        code: object = main.run([command, *wrong])
    except SystemExit as end:
        code = end.code
    assert code == 2
    printed = capsys.readouterr().err
    assert "--frobnicate" in printed
    assert printed.startswith("error: ") or "error: unrecognized arguments" in printed
    assert printed.count("--frobnicate") == 1, "everything else was taken"


def test_the_program_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {command} " in printed for command in main.COMMANDS)
    assert "example:" in printed


# -- names from elsewhere ----------------------------------------------------------------------------------------------


def test_the_page_of_names_is_the_table() -> None:
    """After a change: megatron-fp4 explain --names > docs/names.md."""
    assert (ROOT / "docs/names.md").read_text() == page() + "\n"
    assert len(COUNTERPARTS) >= 40


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_a_counterpart_exists(name: str) -> None:
    setting = COUNTERPARTS[name].setting
    assert not setting or hint_at(setting) is not None or (CONFIG_DIR / setting).is_dir()
    assert setting or COUNTERPARTS[name].how
