"""`megatron-fp4 plan`: what a run will need and how long it will take, in seconds and without a GPU.

    megatron-fp4 plan experiment=paper_12b_10t parallel.tp=8 parallel.pp=2 --gpus 512 --gpu GB200

`planning/report.py` makes the report, a dictionary of plain values; `--json` prints it, otherwise render/plan.py
renders it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from megatron_fp4.cli.compose import ConfigError, compose_config, to_run_config
from megatron_fp4.cli.render.plan import render
from megatron_fp4.planning.report import run_plan
from megatron_fp4.train.telemetry.peaks import GPUS

HELP = """usage: plan [experiment=NAME] [key=value ...] [--gpus N] [--gpu NAME] [--efficiency PART]
            [--schedule] [--json]

  --gpus N           world size (default: the product of the parallel sizes)
  --gpu NAME         {names} (default GB200)
  --efficiency PART  assumed part of the peak rate that GEMMs reach, for the second time estimate (default 0.4)
  --schedule         draw the pipeline schedule: what each pipeline rank does in each time slot
  --json             the report as JSON
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code (2: the configuration is refused)."""
    remaining = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in remaining or "--help" in remaining:
        print(HELP.format(names=", ".join(GPUS)))
        return 0
    try:
        options, overrides = _split(remaining)
        config = to_run_config(compose_config(overrides))
        report = run_plan(
            config, options["--gpus"], options["--gpu"], options["--efficiency"], schedule=options["--schedule"]
        )
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options["--json"] else render(report))
    return 0


def _split(arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Options with their values, and hydra's overrides."""
    options: dict[str, Any] = {"--gpus": 0, "--gpu": "GB200", "--efficiency": 0.4, "--schedule": False, "--json": False}
    overrides, remaining = [], iter(arguments)
    for argument in remaining:
        if argument in ("--schedule", "--json"):
            options[argument] = True
        elif argument in options:
            value = next(remaining, "")
            try:
                options[argument] = type(options[argument])(value)
            except ValueError:
                raise ConfigError(f"{argument} {value!r} is not a number") from None
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument!r}; see --help")
        else:
            overrides.append(argument)
    return options, overrides
