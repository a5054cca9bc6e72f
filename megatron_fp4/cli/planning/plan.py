"""`megatron-fp4 plan`: what a run will need and how long it will take, in seconds and without a GPU.

`planning/report.py` makes the report and `planning/layouts/search.py` the list of layouts, dictionaries of plain
values, which `--json` prints; otherwise render/ renders them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.arguments import returns_code
from megatron_fp4.cli.compose import CONFIG_DIR, compose_config, to_run_config
from megatron_fp4.cli.overrides.shipped import shipped_layouts
from megatron_fp4.cli.planning.options import parse
from megatron_fp4.cli.render.plan import render
from megatron_fp4.cli.render.plan_plot import write_plan
from megatron_fp4.cli.render.plan_time import search_lines
from megatron_fp4.planning.cost.hardware import Assumptions, Site
from megatron_fp4.planning.layouts.search import search
from megatron_fp4.planning.report import run_plan, without_tokenizer
from megatron_fp4.planning.scaling import plot_section
from megatron_fp4.train.config import RunConfig


@returns_code
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    options = parse(arguments)
    try:
        config = without_tokenizer(to_run_config(compose_config(options.overrides, options.config_dir)))
        assumptions = Assumptions.of(options.assume)
        if options.search:
            return _search(config, options, assumptions)
        sections = {"schedule": options.schedule, "roofline": options.roofline}
        report = run_plan(config, options.gpus, options.gpu, assumptions, **sections)
        report["shipped_layouts"] = [] if report["fits"] else shipped_layouts(config.model, CONFIG_DIR)
        if options.plot:
            report["plot"] = plot_section(config, options.gpus, options.gpu, assumptions)
            write_plan(report, render(report), Path(options.plot))
    except (ValueError, OSError) as error:
        unwritten = isinstance(error, OSError) and options.plot and error.strerror  # one of ours says it in words
        reason = f"--plot {options.plot}: {unwritten}; name a file that can be written" if unwritten else error
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["fits"] else 1


def _search(config: RunConfig, options: argparse.Namespace, assumptions: Assumptions) -> int:
    num_gpus = options.gpus or config.parallel.smallest_world
    results = search(
        config, Site(assumptions.machine(options.gpu), assumptions, num_gpus), micro_batches=options.micro_batches
    )
    print(json.dumps(results, indent=2) if options.json else "\n".join(search_lines(results)))
    return 0 if results["fitting"] else 1
