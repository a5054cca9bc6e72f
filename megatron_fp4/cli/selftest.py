"""`megatron-fp4 selftest`: does each backend compute on these devices what the reference computes on a CPU?

Operands byte for byte, products within their bound, gradients that are not zero (precision/selftest/trial.py), for each
backend on every GPU of this machine; under torchrun or srun every rank tries its own GPU, and rank 0 names host and
device of what failed. What `precision.backend=auto` trusts is what passes here.

Without overrides the four named recipes are tried, with them the precisions of that run. What cannot be tried on a
device is said, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import torch

from megatron_fp4.cli.arguments import CommandParser, returns_code
from megatron_fp4.cli.compose import compose_config, to_run_config
from megatron_fp4.comm.bootstrap import choose_device, exit_process
from megatron_fp4.comm.launch import read_launch
from megatron_fp4.comm.rendezvous import RanksNotMet, meet
from megatron_fp4.precision.auto import PREFERENCE, recipe_objection
from megatron_fp4.precision.config import BackendName, PrecisionConfig
from megatron_fp4.precision.recipes import RECIPES
from megatron_fp4.precision.selftest.examine import TRIAL_SECONDS, Rejection, examine
from megatron_fp4.precision.selftest.trial import golden_objections, quantized_precisions
from megatron_fp4.precision.spec import LinearPrecision
from megatron_fp4.train.checked import check_config

EXITS = {0: "nothing failed", 1: "something did"}
MEET_SECONDS = 180.0
MAX_PLACES = 3
WORDS = {"passed": "passed", "failed": "FAILED", "absent": "not here"}
Question = tuple[str, PrecisionConfig, Sequence[LinearPrecision]]
"""What is tried: its name for people, the recipes, the precisions."""


@dataclass(frozen=True)
class TrialResult:
    """outcome: passed, failed, or absent (it cannot be tried here)."""

    host: str
    device: str
    backend: str
    recipe: str
    outcome: str
    reason: str
    seconds: float


@returns_code
def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per device, backend and recipe, and a verdict; returns the exit code."""
    parser = CommandParser("selftest", __doc__, EXITS, "experiment=quickstart", configured=True)
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    args = parser.parse(arguments)
    try:
        launch = read_launch()
        questions = _of_run(args) if args.overrides else _of_recipes()
        devices = [choose_device("auto", launch.local_rank)]
        if launch.world_size == 1 and devices[0].type == "cuda":
            devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        rendezvous = meet(launch, MEET_SECONDS)
        with ThreadPoolExecutor(len(devices)) as pool:
            of_devices = pool.map(lambda device: _try_all(device, questions), devices)
            results = [_golden(), *(result for of_device in of_devices for result in of_device)]
        text = rendezvous.decided_by_rank0(
            "the self-test",
            json.dumps([asdict(result) for result in results]),
            lambda texts: json.dumps([result for text in texts for result in json.loads(text)]),
            TRIAL_SECONDS * len(PREFERENCE) * len(questions),
        )
    except (ValueError, FileNotFoundError, RanksNotMet) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = [TrialResult(**fields) for fields in json.loads(text)]
    if launch.rank == 0:
        _print(results, as_json=args.json)
    rendezvous.leave()
    return 1 if any(result.outcome == "failed" for result in results) else 0


def _of_recipes() -> list[Question]:
    return [
        (name, PrecisionConfig(compile=False, recipes={name: recipe}), [recipe]) for name, recipe in RECIPES.items()
    ]


def _of_run(args: argparse.Namespace) -> list[Question]:
    """Raises ValueError for a run that is refused, or that quantizes nothing."""
    config = to_run_config(compose_config(args.overrides, args.config_dir))
    if config.model.vocab_size:
        config = replace(config, data=replace(config.data, tokenizer=""))
    plan = check_config(
        replace(config, precision=replace(config.precision, backend=BackendName.emulated)),
        config.parallel.smallest_world,
    ).plan
    precisions = quantized_precisions(table.by_name for _, table in plan.labelled_tables())
    if not precisions:
        raise ValueError("this run quantizes no GEMM, so there is nothing to test")
    return [("run", config.precision, precisions)]


def _try_all(device: torch.device, questions: Sequence[Question]) -> list[TrialResult]:
    return [_try(name, question, device) for name in PREFERENCE for question in questions]


def _golden() -> TrialResult:
    """Whether the reference, which the others are held against, is what it was."""
    begun = time.monotonic()
    wrong = golden_objections()
    outcome, seconds = "failed" if wrong else "passed", time.monotonic() - begun
    return TrialResult(socket.gethostname(), "cpu", "reference", "golden", outcome, "; ".join(wrong), seconds)


def _try(name: BackendName, question: Question, device: torch.device) -> TrialResult:
    what, config, precisions = question
    config, begun = replace(config, backend=name), time.monotonic()
    reason = recipe_objection(name, config)
    rejection = Rejection(name, reason, failed=False) if reason else examine(config, precisions, device)
    outcome = "passed" if rejection is None else "failed" if rejection.failed else "absent"
    reason = rejection.reason if rejection else ""
    return TrialResult(socket.gethostname(), str(device), name.name, what, outcome, reason, time.monotonic() - begun)


def _print(results: Sequence[TrialResult], *, as_json: bool) -> None:
    failed = [result for result in results if result.outcome == "failed"]
    if as_json:
        report: Mapping[str, object] = {"results": [asdict(result) for result in results], "failed": len(failed)}
        print(json.dumps(report, indent=2))
        return
    groups: dict[tuple[str, str, str], list[TrialResult]] = {}
    for result in results:
        groups.setdefault((result.outcome, result.backend, result.reason), []).append(result)
    for (outcome, backend, reason), alike in groups.items():
        print(f"{WORDS[outcome]:<9} {backend:<19} {_recipes_and_places(alike)}{f': {reason}' if reason else ''}")
    passed = list(dict.fromkeys(result.backend for result in results if result.outcome == "passed"))
    places = ", ".join(dict.fromkeys(f"{result.backend} on {result.host} {result.device}" for result in failed))
    print(f"verdict: do not trust {places}" if failed else f"verdict: trusted: {', '.join(passed)}")


def _recipes_and_places(results: Sequence[TrialResult]) -> str:
    """`nvfp4, mxfp4 on node7 cuda:3 (12.1 s)`; every place of what failed, three of the rest."""
    recipes = ", ".join(dict.fromkeys(result.recipe for result in results))
    places = list(dict.fromkeys(f"{result.host} {result.device}" for result in results))
    shown = places if results[0].outcome == "failed" else places[:MAX_PLACES]
    more = f" and {len(places) - len(shown)} more" if len(places) > len(shown) else ""
    return f"{recipes} on {', '.join(shown)}{more} ({max(result.seconds for result in results):.1f} s)"


if __name__ == "__main__":  # several ranks: MEGATRON_FP4_MODULE=megatron_fp4.cli.selftest launch/torchrun.sh ...
    exit_process(main())
