"""One parser for every command: the name as it is typed, defaults, exit codes, an example; an error is one sentence.

A command that composes a configuration takes overrides and `--config-dir`, anywhere among its options:

    parser = CommandParser("plan", __doc__, {0: "it fits"}, "experiment=paper_12b_10t --gpus 512", configured=True)
    args = parser.parse(arguments)
    config = to_run_config(compose_config(args.overrides, args.config_dir))
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, NoReturn, ParamSpec

from megatron_fp4.cli.overrides.foreign import counterpart
from megatron_fp4.storage.local import local_path

REFUSED = "refused; nothing was started"


P = ParamSpec("P")


def returns_code(main: Callable[P, int]) -> Callable[P, int]:
    """`main` with argparse's way of leaving as its return value."""

    @wraps(main)
    def leave(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0

    return leave


def above_zero(text: str) -> int:
    """The whole number that an argument says. Raises ArgumentTypeError for another text."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as they were written; the default behind each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if (
            action.option_strings
            and action.default not in (None, False, "", [], argparse.SUPPRESS)
            and "default" not in text
        ):
            text += " (default: %(default)s)"
        return text


def help_page(command: str, exits: Mapping[int, str], example: str) -> dict[str, Any]:
    """What argparse needs to say defaults, exit codes (2, refused, is added) and an example of a command."""
    codes = "\n".join(f"  {code:<4} {text}" for code, text in sorted({2: REFUSED, **exits}.items()))
    epilog = f"exit codes:\n{codes}\n\nexample:\n  megatron-fp4 {command} {example}".rstrip()
    return {"formatter_class": _Formatter, "epilog": epilog}


class CommandParser(argparse.ArgumentParser):
    """Arguments of `megatron-fp4 COMMAND`.

    exits: exit code -> what it means; 2, refused, is added. example: arguments that one would type.
    configured: the command composes a configuration.
    """

    def __init__(
        self, command: str, about: str | None, exits: Mapping[int, str], example: str, *, configured: bool = False
    ) -> None:
        super().__init__(
            prog=f"megatron-fp4 {command}",
            description=about,
            **help_page(command, exits, example),
            allow_abbrev=False,
        )
        self._configured = configured
        if configured:
            self.add_argument("overrides", nargs="*", metavar="key=value", help="a setting, or group=option")
            self.add_argument(
                "--config-dir",
                action="append",
                type=local_path,
                default=[],
                metavar="DIR",
                help="a folder laid out like configs/, added to where YAML files are looked for; may be given again",
            )

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The arguments; leaves with exit code 2 and one sentence for those that are none, with 0 after --help."""
        if not self._configured:
            return self.parse_args(arguments)
        args, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            from megatron_fp4.cli.overrides.mistakes import same_named  # here: other commands need no hydra

            name = unknown[0].partition("=")[0]
            elsewhere = counterpart(name) or same_named(name)
            self.error(f"unknown option {unknown[0]!r}{f'; {elsewhere}' if elsewhere else ''}")
        return args

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and leave."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)
