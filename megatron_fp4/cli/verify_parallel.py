"""`megatron-fp4 verify-parallel experiment=quickstart --layouts "tp2, pp4:zbv"`: does a layout change the numbers?

A small model with every feature of the configured one (proofs/shrink.py) is trained for five steps on synthetic tokens,
by one process and by each layout on local gloo processes; loss, every gradient, the gradient norm and every parameter
are compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_fp4.cli.arguments import CommandParser
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.config import ParallelConfig
from megatron_fp4.comm.local import run_local
from megatron_fp4.models.layout import check_model_layout
from megatron_fp4.proofs.distance import Comparison, compare, worst
from megatron_fp4.proofs.layouts import Layout, parse_layouts, with_overlap
from megatron_fp4.proofs.parity import Case, Record, run_cases
from megatron_fp4.proofs.routing import with_drawn_choices
from megatron_fp4.proofs.shrink import shrink
from megatron_fp4.proofs.verdict import TOLERANCES, find_failures, likely_cause
from megatron_fp4.train.config import RunConfig

DEFAULT_LAYOUTS = "tp2, cp2, dp2, pp2, tp2 pp2 dp2"
EXPERT_LAYOUTS = "ep2, ep4, tp2 ep2, dp2 ep2, pp2 ep2, cp2 ep2"
EXITS = {0: "all layouts agree with one process", 1: "one does not"}
EXAMPLE = 'experiment=quickstart --layouts "tp2, pp4:zbv"'
HEADER = f"{'layout':<26} {'case':<7} {'loss':>8} {'norm':>8} {'grads':>8} {'step 1':>8} {'step n':>8}  result"


def main(arguments: Sequence[str], worker: Callable[..., list[Record]] = run_cases) -> int:
    """Returns the exit code. worker: what runs on each rank (tests plant bugs in it)."""
    parser = CommandParser("verify-parallel", __doc__, EXITS, EXAMPLE, configured=True)
    parser.add_argument("--layouts", help=f"separated by commas; {DEFAULT_LAYOUTS}; with experts {EXPERT_LAYOUTS}")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one layout")
    args = parser.parse(arguments)
    try:
        if args.steps < 2:
            raise ValueError(f"--steps = {args.steps}, must be at least 2")
        config = to_run_config(compose_config(args.overrides, args.config_dir))
        asked = args.layouts or (EXPERT_LAYOUTS if "E" in config.model.blocks else DEFAULT_LAYOUTS)
        layouts = [with_overlap(layout, config.parallel.overlap_tensor) for layout in parse_layouts(asked)]
        cases = [with_drawn_choices(replace(case, num_steps=args.steps)) for case in shrink(config, layouts)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _announce(config, cases, layouts)
    (reference,) = run_local(run_cases, 1, cases, ParallelConfig(), timeout_seconds=args.timeout)
    print(HEADER, flush=True)
    wrong = sum(_check(layout, cases, reference, worker, args.timeout) for layout in layouts)
    total = len(layouts) * len(cases)
    print(f"{total - wrong} of {total} comparisons passed")
    return 1 if wrong else 0


def _announce(config: RunConfig, cases: Sequence[Case], layouts: Sequence[Layout]) -> None:
    small = cases[0].config
    model = small.model
    print(
        f"checked on: {model.num_layers} blocks {model.blocks}, hidden {model.hidden}, heads {model.num_heads}/"
        f"{model.num_kv_heads}, vocabulary {model.vocab_size}, {small.train.global_batch} samples of"
        f" {small.data.seq_length} tokens, {cases[0].num_steps} steps"
    )
    tokens = config.train.micro_batch * config.data.seq_length
    for layout in layouts:
        try:
            check_model_layout(
                replace(config.model, vocab_size=config.model.vocab_size or layout.parallel.tp),
                layout.parallel,
                seq_length=config.data.seq_length,
                tokens=tokens // layout.parallel.cp,
            )
        except ValueError as error:
            print(f"note: the full-size model cannot use {layout.name}: {error}")


def _check(
    layout: Layout, cases: list[Case], reference: Any, worker: Callable[..., list[Record]], timeout: float
) -> int:
    """Print one line per case; returns how many differ."""
    began = time.monotonic()
    try:
        records = run_local(worker, layout.world_size, cases, layout.parallel, timeout_seconds=timeout)
    except (RuntimeError, TimeoutError) as error:
        print(f"{layout.name:<26} does not run: {str(error).strip().splitlines()[-1]}\n{error}", flush=True)
        return len(cases)
    passed: dict[str, bool] = {}
    for number, case in enumerate(cases):
        comparison = compare(reference[number], [record[number] for record in records])
        failures = find_failures(comparison, TOLERANCES[case.name])
        passed[case.name] = not failures
        print(_line(layout, case, comparison, failed=bool(failures)), flush=True)
        if failures:
            tied = case.config.model.tied_embeddings
            cause = likely_cause(layout, comparison, TOLERANCES[case.name], tied=tied, passed=passed)
            more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
            print(f"    {failures[0]}{more}\n    likely cause: {cause}", flush=True)
    print(f"{'':<26} {time.monotonic() - began:.0f} s", flush=True)
    return sum(not ok for ok in passed.values())


def _line(layout: Layout, case: Case, compared: Comparison, *, failed: bool) -> str:
    parameters = [worst(differences) for differences in compared.masters.values()]
    errors = [compared.loss_error, compared.norm_error, worst(compared.grads), *parameters]
    equal = not any(errors) and not failed
    cells = " ".join(f"{'=' if error == 0.0 else f'{error:.0e}':>8}" for error in errors)
    return f"{layout.name:<26} {case.name:<7} {cells}  {'FAILED' if failed else 'equal' if equal else 'ok'}"
