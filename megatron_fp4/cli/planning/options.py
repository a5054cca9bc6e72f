"""Arguments of `megatron-fp4 plan`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_fp4.cli.arguments import CommandParser, above_zero
from megatron_fp4.planning.cost.hardware import DEFAULT_GPU, Assumptions
from megatron_fp4.planning.cost.machines import MACHINES
from megatron_fp4.planning.layouts.choices import MICRO_BATCHES

ABOUT = """What a run will need and how long it will take, in seconds and without a GPU.

    megatron-fp4 plan experiment=paper_12b_10t --search --gpus 4096     the fastest layouts
"""
EXITS = {0: "it fits", 1: "it does not fit, or the backend cannot quantize its shapes"}
EXAMPLE = "experiment=paper_12b_10t parallel.tp=8 parallel.pp=2 --gpus 512 --gpu GB200"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; what contradicts each other is refused."""
    defaults = Assumptions()
    keys = ", ".join(item.name for item in dataclasses.fields(Assumptions))
    parser = CommandParser("plan", ABOUT, EXITS, EXAMPLE, configured=True)
    add = parser.add_argument
    add("--gpus", type=above_zero, default=0, help="world size (default: the product of the parallel sizes)")
    add("--gpu", default=DEFAULT_GPU, help=", ".join(MACHINES))
    add("--search", action="store_true", help="every layout that fits, fastest first, and why the others fell out")
    add(
        "--micro-batch",
        type=above_zero,
        default=0,
        help=f"with --search: only this (default: {', '.join(map(str, MICRO_BATCHES))})",
    )
    share, efficiency = f"{defaults.memory_share:g}", f"{defaults.efficiency:g}"
    add("--memory-share", metavar="PART", help=f"part of a GPU's memory for --search to plan with (default: {share})")
    add("--efficiency", metavar="PART", help=f"assumed part of the peak rate of products (default: {efficiency})")
    add("--assume", action="append", default=[], metavar="KEY=VALUE", help=f"another figure or assumption: {keys}")
    add("--schedule", action="store_true", help="what each pipeline rank does in each time slot")
    add("--roofline", action="store_true", help="each linear's products against its quantizers; sums on other GPUs")
    add("--plot", default="", metavar="FILE", help="memory, timeline and strong scaling, as a .png or an .html")
    add("--json", action="store_true", help="the report as JSON")
    options = parser.parse(arguments)
    if options.search and (options.schedule or options.roofline or options.plot):
        parser.error("--schedule, --roofline and --plot are of one layout; leave them out with --search")
    if options.micro_batch and not options.search:
        parser.error("--micro-batch belongs to --search; elsewhere it is train.micro_batch=N")
    if options.plot and (Path(options.plot).suffix not in (".png", ".html") or Path(options.plot).is_dir()):
        parser.error(f"--plot {options.plot}: no file that can be written; its name must end with .png or .html")
    own = {"efficiency": options.efficiency, "memory_share": options.memory_share}
    options.micro_batches = (options.micro_batch,) if options.micro_batch else MICRO_BATCHES
    options.assume = [*(f"{name}={value}" for name, value in own.items() if value is not None), *options.assume]
    return options
