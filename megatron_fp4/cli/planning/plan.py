"""`megatron-fp4 plan`: what a run will need and how long it will take, in seconds and without a GPU.

    megatron-fp4 plan experiment=paper_12b_10t parallel.tp=8 parallel.pp=2 --gpus 512 --gpu GB200
    megatron-fp4 plan experiment=paper_12b_10t --search --gpus 4096

`planning/report.py` makes the report and `planning/layouts/search.py` the list of layouts, dictionaries of plain
values, which `--json` prints; otherwise render/ renders them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_fp4.cli.compose import CONFIG_DIR, ConfigError, compose_config, to_run_config
from megatron_fp4.cli.overrides.shipped import shipped_layouts
from megatron_fp4.cli.render.plan import render
from megatron_fp4.cli.render.plan_plot import write_plan
from megatron_fp4.cli.render.plan_time import search_lines
from megatron_fp4.planning.cost.hardware import DEFAULT_GPU, Assumptions, Site
from megatron_fp4.planning.cost.machines import MACHINES
from megatron_fp4.planning.layouts.choices import MICRO_BATCHES
from megatron_fp4.planning.layouts.search import search
from megatron_fp4.planning.report import run_plan, without_tokenizer
from megatron_fp4.planning.scaling import plot_section
from megatron_fp4.train.config import RunConfig

HELP = """usage: plan [experiment=NAME] [key=value ...] [--gpus N] [--gpu NAME] [--search] [--micro-batch N]
            [--memory-share PART] [--efficiency PART] [--assume KEY=VALUE ...] [--schedule] [--roofline]
            [--plot FILE] [--json]

  --gpus N             world size (default: the product of the parallel sizes)
  --gpu NAME           {names} (default GB200)
  --search             every layout of the world that fits, fastest first, and why the others fell out
  --micro-batch N      with --search: layouts of this micro batch only (default: {micro_batches})
  --memory-share PART  part of a GPU's memory that a layout of --search may plan with (default {share:g})
  --efficiency PART    assumed part of the peak rate that matrix products reach (default {efficiency:g})
  --assume KEY=VALUE   replace a figure or an assumption: {keys}
  --schedule           draw the pipeline schedule: what each pipeline rank does in each time slot
  --roofline           each linear's products against its quantizers; the sums on other GPUs too
  --plot FILE          memory, timeline and strong scaling, as a .png or an .html
  --json               the report as JSON

exit codes: 0 it fits, 1 it does not fit or the backend cannot quantize its shapes, 2 the configuration is refused
"""


@dataclass
class Options:
    """What the command line says besides overrides."""

    gpus: int = 0
    gpu: str = DEFAULT_GPU
    search: bool = False
    micro_batch: int = 0
    schedule: bool = False
    roofline: bool = False
    json: bool = False
    plot: str = ""
    assume: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)


SHORT = {"--efficiency": "efficiency", "--memory-share": "memory_share"}
"""Assumptions with an option of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    remaining = list(sys.argv[1:] if arguments is None else arguments)
    if "-h" in remaining or "--help" in remaining:
        print(_help())
        return 0
    try:
        options = _parse(remaining)
        config = without_tokenizer(to_run_config(compose_config(options.overrides)))
        assumptions = Assumptions.of(options.assume)
        if options.search:
            return _search(config, options, assumptions)
        sections = {"schedule": options.schedule, "roofline": options.roofline}
        report = run_plan(config, options.gpus, options.gpu, assumptions, **sections)
        report["shipped_layouts"] = [] if report["fits"] else shipped_layouts(config.model, CONFIG_DIR)
        if options.plot:
            report["plot"] = plot_section(config, options.gpus, options.gpu, assumptions)
            write_plan(report, render(report), Path(options.plot))
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: --plot {options.plot}: {error.strerror}; name a file that can be written", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["fits"] else 1


def _search(config: RunConfig, options: Options, assumptions: Assumptions) -> int:
    num_gpus = options.gpus or config.parallel.smallest_world
    sizes = (options.micro_batch,) if options.micro_batch else MICRO_BATCHES
    results = search(config, Site(assumptions.machine(options.gpu), assumptions, num_gpus), micro_batches=sizes)
    print(json.dumps(results, indent=2) if options.json else "\n".join(search_lines(results)))
    return 0 if results["fitting"] else 1


def _help() -> str:
    defaults = Assumptions()
    keys = ", ".join(item.name for item in dataclasses.fields(Assumptions))
    return HELP.format(
        names=", ".join(MACHINES),
        share=defaults.memory_share,
        efficiency=defaults.efficiency,
        keys=keys,
        micro_batches=", ".join(map(str, MICRO_BATCHES)),
    )


def _parse(arguments: list[str]) -> Options:
    """Raises ConfigError for an unknown option or a value that is missing or no number."""
    options, remaining = Options(), iter(arguments)
    for argument in remaining:
        name = argument.removeprefix("--")
        if argument in ("--search", "--schedule", "--roofline", "--json"):
            setattr(options, name, True)
        elif argument in ("--gpus", "--gpu", "--micro-batch", "--plot", "--assume", *SHORT):
            value = next(remaining, "")
            if not value:
                raise ConfigError(f"{argument} needs a value; see --help")
            _set(options, argument, value)
        elif argument.startswith("-"):
            raise ConfigError(f"unknown option {argument!r}; see --help")
        else:
            options.overrides.append(argument)
    if options.search and (options.schedule or options.roofline or options.plot):
        raise ConfigError("--schedule, --roofline and --plot are of one layout; leave them out with --search")
    if options.micro_batch and not options.search:
        raise ConfigError("--micro-batch belongs to --search; elsewhere it is train.micro_batch=N")
    return options


def _set(options: Options, argument: str, value: str) -> None:
    if argument in ("--gpus", "--micro-batch"):
        if not value.isdecimal() or not int(value):
            raise ConfigError(f"{argument} {value!r} is not a whole number above 0")
        setattr(options, argument.removeprefix("--").replace("-", "_"), int(value))
    elif argument in SHORT:
        options.assume.append(f"{SHORT[argument]}={value}")
    elif argument == "--assume":
        options.assume.append(value)
    elif argument == "--plot" and (Path(value).suffix not in (".png", ".html") or Path(value).is_dir()):
        raise ConfigError(f"--plot {value}: no file that can be written; its name must end with .png or .html")
    else:
        setattr(options, argument.removeprefix("--"), value)
